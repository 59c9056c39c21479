"""Roles of members, the work budget, and that reduced decoding refuses exactly what full decoding refuses."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spatial_core.errors import TarError
from spatial_core.images import decode
from spatial_core.schemas import FOLDER_REASON
from spatial_core.street_view import member_checks
from spatial_core.street_view.member_checks import Fault, ImageFacts, MemoryBudget, Task, assign_role, inspect
from spatial_core.street_view.tar_index import TarMember


def member(name: str, kind: str = "file", size: int = 0) -> TarMember:
    return TarMember(name, kind, 0, 0, size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "role", "stem"),
    [
        ("0101/0101/a.jpg", "image", "0101/0101/a"),
        ("a.JPEG", "image", "a"),
        ("./x/a.b.txt", "text", "x/a.b"),
        ("x/..a/b..Txt", "text", "x/..a/b."),
        ("Straße/ä.jpg", "image", "Straße/ä"),
    ],
)
def test_roles(name: str, role: str, stem: str) -> None:
    assert assign_role(member(name)) == Task(member(name), role, stem)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "unsafe_name"),
        ("/a.jpg", "unsafe_name"),
        ("..", "unsafe_name"),
        ("../a.jpg", "unsafe_name"),
        ("a/../b.jpg", "unsafe_name"),
        ("a\\b.jpg", "unsafe_name"),
        ("a\0b.jpg", "unsafe_name"),
        ("a\nb.jpg", "unsafe_name"),
        ("a\x1b[2Jb.jpg", "unsafe_name"),
        ("a\u202egpj.txt", "unsafe_name"),
        ("caf\udce9.jpg", "unsafe_name"),
        ("jpg", "unknown_suffix"),
        (".jpg", "unknown_suffix"),
        ("a/.txt", "unknown_suffix"),
        ("a.png", "unknown_suffix"),
        ("a.jpg.part", "unknown_suffix"),
        ("a.jpg/", "unknown_suffix"),
    ],
)
def test_names_without_a_role(name: str, reason: str) -> None:
    found = assign_role(member(name))
    assert isinstance(found, Fault)
    assert found.reason == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [("0101/", FOLDER_REASON), ("./", FOLDER_REASON), ("../", "unsafe_name"), ("/", "unsafe_name")],
)
def test_folders(name: str, reason: str) -> None:
    found = assign_role(member(name, "directory"))
    assert isinstance(found, Fault)
    assert found.reason == reason


def verdict(path: Path, data: bytes) -> ImageFacts | str:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        task = Task(member("a.jpg", size=len(data)), "image", "a")
        (finding,) = inspect(fd, path, [task], 101, MemoryBudget())
    finally:
        os.close(fd)
    assert isinstance(finding, ImageFacts | Fault)
    return finding if isinstance(finding, ImageFacts) else finding.reason


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restart_blocks", [0, 5])
@pytest.mark.parametrize(("mode", "subsampling"), [("RGB", 0), ("RGB", 2), ("L", 0)])
def test_the_verdict_is_that_of_full_decoding(
    tmp_path: Path, progressive: bool, restart_blocks: int, mode: str, subsampling: int
) -> None:
    """Checking decodes at reduced scale and by faster arithmetic; neither may change what is refused."""
    rng = np.random.default_rng(9)
    sound = noisy_picture(
        rng, mode, progressive=progressive, restart_marker_blocks=restart_blocks, subsampling=subsampling
    )
    seen = set()
    for turn in range(200):
        damaged = bytearray(sound)
        if turn and rng.random() < 0.3:
            del damaged[int(rng.integers(2, len(damaged))) :]
        elif turn:
            damaged[int(rng.integers(0, len(damaged)))] ^= 1 << int(rng.integers(0, 8))
        try:
            height, width, _ = decode.decode_jpeg(bytes(damaged)).shape
            expected: ImageFacts | str = ImageFacts(width, height, hashlib.sha256(damaged).digest())
        except decode.ImageError as error:
            expected = error.reason
        assert verdict(tmp_path / "t", bytes(damaged)) == expected
        seen.add(expected if isinstance(expected, str) else "sound")
    assert {"sound", "image_corrupt"} <= seen


def noisy_picture(rng: np.random.Generator, mode: str, **options: int) -> bytes:
    stream = io.BytesIO()
    pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).resize((400, 300)).save(stream, "JPEG", quality=60, **options)
    return stream.getvalue()


def test_budget_is_never_exceeded_and_large_holders_work_alone() -> None:
    budget = MemoryBudget(capacity=100)
    held: list[int] = []
    most = 0
    lock = threading.Lock()

    def work(amount: int) -> None:
        nonlocal most
        for _ in range(20):
            with budget.hold(amount):
                with lock:
                    held.append(amount)
                    most = max(most, sum(held))
                    alone = len(held) == 1
                assert amount < 100 or alone
                time.sleep(0.0005)
                with lock:
                    held.remove(amount)

    threads = [threading.Thread(target=work, args=(amount,)) for amount in (20, 30, 40, 60, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert most <= 100


def test_more_than_the_whole_budget_is_still_served() -> None:
    with MemoryBudget(capacity=10).hold(1000):
        pass


def test_images_beyond_the_usual_size_are_judged_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = noisy_picture(np.random.default_rng(3), "RGB")
    usual = verdict(tmp_path / "t", sound), verdict(tmp_path / "t", sound[:-9])
    monkeypatch.setattr(member_checks, "_USUAL_PIXEL_BYTES", 0)
    assert (verdict(tmp_path / "t", sound), verdict(tmp_path / "t", sound[:-9])) == usual
    assert usual[1] == "image_corrupt"


def test_members_too_long_to_hold_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "0101.tar"
    path.touch()
    os.truncate(path, member_checks.MAX_IMAGE_BYTES + 1)
    fd = os.open(path, os.O_RDONLY)
    image = Task(member("a.jpg", size=member_checks.MAX_IMAGE_BYTES + 1), "image", "a")
    text = Task(member("a.txt", size=20_000), "text", "a")
    found = inspect(fd, path, [image, text], 101, MemoryBudget())
    os.close(fd)
    assert [finding.reason for finding in found if isinstance(finding, Fault)] == [
        "image_too_many_bytes",
        "text_too_long",
    ]


def test_a_tar_that_shrank_is_an_error_not_a_fault_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "0101.tar"
    path.write_bytes(bytes(100))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(TarError, match=r"0101\.tar: byte 100: the file ends inside the data of 'a\.jpg'"):
        inspect(fd, path, [Task(member("a.jpg", size=500), "image", "a")], 101, MemoryBudget())
    os.close(fd)
