"""Roles of members, the work budget, and that reduced decoding refuses exactly what full decoding refuses."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from spatial_core.images.decode import ImageError, decode_jpeg
from spatial_core.street_view.member_checks import (
    Fault,
    ImageFacts,
    MemoryBudget,
    Task,
    assign_role,
    inspect,
    is_directory,
)
from spatial_core.street_view.tar_index import TarMember
from tests.data.make_tars import picture, pillow_image


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


def test_folders() -> None:
    assert is_directory(member("0101/", "directory"))
    assert is_directory(member("./", "directory"))
    assert not is_directory(member("../", "directory"))
    assert not is_directory(member("/", "directory"))
    assert not is_directory(member("0101"))


def verdict(path: Path, data: bytes, budget: MemoryBudget) -> ImageFacts | str:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        (finding,) = inspect(fd, path, [Task(member("a.jpg", size=len(data)), "image", "a")], 101, budget)
    finally:
        os.close(fd)
    assert isinstance(finding, ImageFacts | Fault)
    return finding if isinstance(finding, ImageFacts) else finding.reason


@pytest.mark.parametrize("progressive", [False, True])
def test_reduced_decoding_refuses_what_full_decoding_refuses(tmp_path: Path, progressive: bool) -> None:
    """Pictures too large for the work budget are decoded at reduced scale; the verdict must not depend on it."""
    rng = np.random.default_rng(9)
    sound = pillow_image("RGB", (700, 600), "JPEG", progressive=True) if progressive else picture(rng, 700)
    ample, tight = MemoryBudget(), MemoryBudget(capacity=1)
    assert verdict(tmp_path / "t", sound, ample) == verdict(tmp_path / "t", sound, tight)
    seen = set()
    for _ in range(150):
        damaged = bytearray(sound)
        if rng.random() < 0.3:
            del damaged[int(rng.integers(100, len(damaged))) :]
        else:
            damaged[int(rng.integers(0, len(damaged)))] ^= 1 << int(rng.integers(0, 8))
        full = verdict(tmp_path / "t", bytes(damaged), ample)
        assert verdict(tmp_path / "t", bytes(damaged), tight) == full
        seen.add(full if isinstance(full, str) else "sound")
    assert {"sound", "image_corrupt"} <= seen


def test_the_verdict_is_that_of_the_shared_policy(tmp_path: Path) -> None:
    sound = picture(np.random.default_rng(4), 64)
    for cut in range(0, len(sound), 97):
        try:
            decode_jpeg(sound[:cut])
            reason = "sound"
        except ImageError as error:
            reason = error.reason
        found = verdict(tmp_path / "t", sound[:cut], MemoryBudget())
        assert (found if isinstance(found, str) else "sound") == reason


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
