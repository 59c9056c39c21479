"""Atomic writes: what a reader sees when a writer fails, is killed, or is not alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spatial_core.errors import ArtifactBusy
from spatial_core.storage.atomic import atomic_directory, atomic_file, exclusive, write_json


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with atomic_directory(folder) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(folder) as temporary:
        (temporary / "two").write_text("2")
        raise RuntimeError
    assert [entry.name for entry in folder.iterdir()] == ["one"]
    with atomic_directory(folder) as temporary:
        (temporary / "three").write_text("3")
    assert [entry.name for entry in folder.iterdir()] == ["three"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from spatial_core.storage.atomic import atomic_file, exclusive
with exclusive(Path(sys.argv[1])), atomic_file(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with pytest.raises(ArtifactBusy, match=r"a\.txt"), exclusive(path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert not path.exists()
    deadline = time.monotonic() + 5
    while any(entry.name.endswith(".partial") for entry in tmp_path.iterdir()) and time.monotonic() < deadline:
        with exclusive(path):
            pass
    assert [entry.name for entry in tmp_path.iterdir()] == [".a.txt.lock"]
