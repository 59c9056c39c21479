"""Ingest as a process among others: killed at any moment, run twice at once, out of disk, in bounded memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_tars import BLOCK, d_line, pillow_image, street_view, tar_bytes

OUTPUTS = ("0101.parquet", "0101_rejects.parquet")
DATA = tar_bytes(street_view(101, seed=3, targets=100, side_px=64)[1:])

CHILD = """
import os, signal, sys, time
from pathlib import Path
import spatial_core.storage.atomic as atomic
import spatial_core.street_view.ingest as ingest
from spatial_core.config.settings import Settings

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

moment, tar, out = sys.argv[1:]
progress = lambda *_: None
if moment == "while_reading":
    progress = die
elif moment == "before_any_file":
    ingest.FollowingDigest.hexdigest = die
elif moment == "between_the_files":
    rename, renamed = atomic.Path.replace, []
    def replace(self, target):
        renamed.append(target)
        return rename(self, target) if len(renamed) == 1 else die()
    atomic.Path.replace = replace
elif moment == "before_the_manifest":
    ingest.record_artifact = die
elif moment == "pause":
    def progress(*_):
        if not Path(out, "go").exists():
            Path(out, "reading").touch()
        while not Path(out, "go").exists():
            time.sleep(0.02)
elif moment == "full":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
ingest.ingest_tar(Path(tar), Path(out), Settings(infrastructure={"threads": 2}), progress)
"""


def child(moment: str, tar: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, moment, str(tar), str(out)], stderr=subprocess.PIPE, text=True
    )


def contents(out: Path) -> list[bytes]:
    return [out.joinpath(name).read_bytes() for name in OUTPUTS]


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "raw/0101.tar"
    path.parent.mkdir()
    path.write_bytes(DATA)
    return path


@pytest.fixture
def undisturbed(tmp_path: Path, tar: Path) -> list[bytes]:
    """What an undisturbed run writes."""
    ingest_tar(tar, tmp_path / "undisturbed", Settings())
    return contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("moment", "seen"),
    [
        ("while_reading", set()),
        ("before_any_file", set()),
        ("between_the_files", {"0101_rejects.parquet"}),
        ("before_the_manifest", set(OUTPUTS)),
    ],
)
def test_killed_at_a_chosen_moment(
    tmp_path: Path, tar: Path, undisturbed: list[bytes], moment: str, seen: set[str]
) -> None:
    out = tmp_path / "out"
    killed = child(moment, tar, out)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, errors
    found = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert found - {"_manifests"} == seen
    for name in seen:  # what is visible is whole
        assert out.joinpath(name).read_bytes() == undisturbed[OUTPUTS.index(name)]
    report = ingest_tar(tar, out, Settings())
    assert not report.up_to_date
    assert contents(out) == undisturbed
    assert not list(out.glob(".*.partial*"))
    assert ingest_tar(tar, out, Settings()).up_to_date


def test_killed_at_random_moments(tmp_path: Path, tar: Path, undisturbed: list[bytes]) -> None:
    out = tmp_path / "out"
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))
    for _ in range(6):
        running = child("never", tar, out)
        time.sleep(rng.uniform(0.1, 1.2))
        running.kill()
        running.communicate(timeout=60)
        for name, data in zip(OUTPUTS, undisturbed, strict=True):
            assert not out.joinpath(name).exists() or out.joinpath(name).read_bytes() == data
    ingest_tar(tar, out, Settings())
    assert contents(out) == undisturbed
    assert not list(out.glob(".*.partial*"))


def test_two_writers(tmp_path: Path, tar: Path, undisturbed: list[bytes]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = child("pause", tar, out)
    deadline = time.monotonic() + 60
    while not (out / "reading").exists() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(ArtifactBusy, match=r"0101\.parquet"):
        ingest_tar(tar, out, Settings())
    (out / "go").touch()
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 0, errors
    assert contents(out) == undisturbed
    assert ingest_tar(tar, out, Settings()).up_to_date


def test_a_full_disk_leaves_nothing(tmp_path: Path, tar: Path, undisturbed: list[bytes]) -> None:
    out = tmp_path / "out"
    full = child("full", tar, out)
    _, errors = full.communicate(timeout=60)
    assert full.returncode == 1
    assert "OSError" in errors
    assert [path.name for path in out.iterdir() if not path.name.endswith(".lock")] == []
    ingest_tar(tar, out, Settings())
    assert contents(out) == undisturbed


MEASURED_CHILD = """
import re, sys, threading, time
from pathlib import Path
from spatial_core.config.settings import Settings
from spatial_core.street_view.ingest import ingest_tar

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

peak, done = private(), threading.Event()
def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, private())

watcher = threading.Thread(target=watch)
watcher.start()
report = ingest_tar(Path(sys.argv[1]), Path(sys.argv[2]), Settings())
done.set()
watcher.join()
print(report.rows, report.rows_in, max(peak, private()))
"""


@pytest.mark.slow
def test_memory_stays_bounded_on_a_tar_of_more_than_4_gb(tmp_path: Path) -> None:
    """20 000 pairs whose images all lie before their texts, pictures of up to 60 megapixels, 4 GB of something else.

    Counted is all private memory of the process, the interpreter and libraries included; 300 MB are allowed beyond
    mapped file pages.
    """
    rng = np.random.default_rng(11)
    pairs = 20_000
    small = pillow_image("RGB", (16, 16), "JPEG")
    large = {
        7 + 1000 * place: pillow_image("RGB", size, "JPEG", progressive=progressive)
        for place, (size, progressive) in enumerate(
            [((10_000, 6_000), False), ((4_000, 3_000), False), ((4_000, 3_000), True), ((3_000, 2_000), False)] * 3
        )
    }
    path = tmp_path / "0101.tar"
    with path.open("wb") as handle:
        for patch in range(pairs):
            handle.write(_member(f"0101/0101/{patch:07d}.jpg", large.get(patch, small)))
        handle.write(_member("0101/0101/something.bin", b"", size=4 << 30))
        handle.seek(4 << 30, os.SEEK_CUR)  # sparse on disk, read as zeros
        for patch in range(pairs):
            text = d_line(rng, 101, patch // 3, patch, patch)
            handle.write(_member(f"0101/0101/{patch:07d}.txt", text.encode()))
        handle.write(bytes(2 * BLOCK))
    assert path.stat().st_size > 4 << 30

    run = subprocess.run(
        [sys.executable, "-c", MEASURED_CHILD, str(path), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows, members, peak_mib = run.stdout.split()
    assert (int(rows), int(members)) == (pairs, 2 * pairs + 1)
    assert float(peak_mib) * 1.048576 < 300


def _member(name: str, data: bytes, size: int | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)
