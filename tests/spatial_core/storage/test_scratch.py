"""Node-local scratch: where files are while they are written, and what is left afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, StorageFull
from spatial_core.storage.atomic import atomic_directory, atomic_file, write_json
from spatial_core.storage.scratch import local_scratch, scratch_folder, working_path
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_tars import street_view, tar_bytes


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_file_is_written_in_scratch_and_appears_whole_at_its_place(scratch: Path, tmp_path: Path) -> None:
    path = tmp_path / "lake" / "a.bin"
    path.parent.mkdir()
    path.write_bytes(b"old")
    with local_scratch(str(scratch)):
        own = scratch_folder()
        assert own is not None and own.parent == scratch
        with atomic_file(path) as temporary:
            assert temporary.parent == own
            temporary.write_bytes(b"new")
            assert files(path.parent) == {"a.bin": b"old"}
        assert files(path.parent) == {"a.bin": b"new"}
        assert [entry.name for entry in own.iterdir()] == [".lock"]
    assert list(scratch.iterdir()) == []
    assert scratch_folder() is None
    assert working_path(path) == path


def test_a_folder_is_written_in_scratch_and_replaces_the_old_one(scratch: Path, tmp_path: Path) -> None:
    folder = tmp_path / "lake" / "model"
    with local_scratch(str(scratch)):
        for content in (b"1", b"2"):
            with atomic_directory(folder) as temporary:
                assert scratch in temporary.parents
                (temporary / "sub").mkdir()
                (temporary / "sub" / content.decode()).write_bytes(content)
                with atomic_file(temporary / "sub" / content.decode()) as inner:
                    assert inner.parent == temporary / "sub", "from scratch to scratch nothing need be copied"
                    inner.write_bytes(content)
    assert files(folder.parent) == {"model/sub/2": b"2"}
    assert list(scratch.iterdir()) == []


def test_a_failure_leaves_nothing_in_either_place(scratch: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with local_scratch(str(scratch)):
        with pytest.raises(KeyError), atomic_file(lake / "a") as temporary:
            temporary.write_bytes(b"half")
            raise KeyError
        with pytest.raises(KeyError), atomic_directory(lake / "b") as temporary:
            (temporary / "half").write_bytes(b"half")
            raise KeyError
        assert files(lake) == {}
        assert list(files(scratch)) == [f"{scratch_folder().name}/.lock"]  # type: ignore[union-attr]


def test_small_records_skip_scratch(scratch: Path, tmp_path: Path) -> None:
    with local_scratch(str(scratch)):
        shutil.rmtree(scratch_folder())  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "lake" / "b") as temporary:
            temporary.write_bytes(b"b")
        write_json(tmp_path / "lake" / "a.json", {"x": 1})
    assert (tmp_path / "lake" / "a.json").exists()


def test_a_stage_gives_the_same_bytes_with_and_without(scratch: Path, tmp_path: Path) -> None:
    tar = tmp_path / "0101.tar"
    tar.write_bytes(tar_bytes(street_view(101, seed=3, targets=6, side_px=72)))
    ingest_tar(tar, tmp_path / "without", Settings())
    with local_scratch(str(scratch)):
        ingest_tar(tar, tmp_path / "with", Settings())
    without, with_scratch = (
        {name: data for name, data in files(tmp_path / name).items() if name.endswith(".parquet")}
        for name in ("without", "with")
    )
    assert set(without) == {"0101.parquet", "0101_rejects.parquet"}
    assert with_scratch == without
    assert not [name for name in files(tmp_path / "with") if name.endswith(".partial")]
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("expression", "cause"),
    [
        ("$NO_SUCH_VARIABLE/x", r"\$NO_SUCH_VARIABLE/x: a variable in it is not set on "),
        ("{}/absent", "absent: no such folder on "),
        ("scratch", "scratch: no such folder on "),
        ("/proc", "/proc: cannot be written in on "),
    ],
)
def test_a_folder_that_is_not_there_is_named(expression: str, cause: str, scratch: Path) -> None:
    with pytest.raises(ConfigError, match=cause), local_scratch(expression.format(scratch)):
        pass


def test_a_variable_of_the_job_names_the_folder(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch.parent))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with local_scratch("$SLURM_TMPDIR/scratch"):
        (own,) = scratch.iterdir()
        assert own.name.startswith("spatial-77-")
        assert own.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(number: int, scratch: Path, tmp_path: Path) -> None:
    full = OSError(number, os.strerror(number))
    with local_scratch(str(scratch)):
        where = rf"scratch folder {scratch}/spatial-\S+: no space left for a on "
        with pytest.raises(StorageFull, match=where), atomic_file(tmp_path / "a"):
            raise full
        with pytest.raises(StorageFull, match="scratch folder"), atomic_directory(tmp_path / "b"):
            raise full
        with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
            raise PermissionError
    with pytest.raises(StorageFull, match=rf"^{tmp_path}: no space left"), atomic_file(tmp_path / "a"):
        raise full


HOLD = """
import sys, time
from pathlib import Path
from spatial_core.storage.atomic import atomic_file
from spatial_core.storage.scratch import local_scratch
with local_scratch(sys.argv[1]), atomic_file(Path(sys.argv[2])) as temporary:
    temporary.write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_job_left_is_removed_and_a_running_job_is_left_alone(scratch: Path, tmp_path: Path) -> None:
    (scratch / "spatial-of-somebody").mkdir()
    (scratch / "other").mkdir()
    command = [sys.executable, "-c", HOLD, str(scratch), str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holding\n"
        with local_scratch(str(scratch)):
            assert "half" in [data.decode() for data in files(scratch).values()]
        assert "half" in [data.decode() for data in files(scratch).values()]
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert "half" in [data.decode() for data in files(scratch).values()]
    with local_scratch(str(scratch)):
        assert set(files(scratch).values()) == {b""}
    assert sorted(path.name for path in scratch.iterdir()) == ["other", "spatial-of-somebody"]
