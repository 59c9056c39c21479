"""Folders that are replaced as a whole: what a stage may take for its own earlier output, and what it never may."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.errors import InputError
from spatial_core.report import Report
from spatial_core.storage.provenance import Provenance, record_artifact
from spatial_core.storage.replaceable import require_replaceable


def made(folder: Path, stage: str, *names: str) -> Path:
    """A finished artifact of a stage."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    record_artifact(folder, "key", Provenance(stage, "1", ""), Report(stage, folder, 1, 1, 1))
    return folder


def test_nothing_an_empty_folder_and_files_that_start_with_a_dot_may_make_way(tmp_path: Path) -> None:
    require_replaceable(tmp_path / "new", "publish", ())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".x.lock").touch()
    require_replaceable(tmp_path / "empty", "publish", ())


def test_an_earlier_output_may_make_way_even_when_damaged(tmp_path: Path) -> None:
    model = made(tmp_path / "model", "publish", "README.md", "golden/00.jpg")
    (model / "README.md").write_text("damaged")
    require_replaceable(model, "publish", ())


def test_an_output_that_was_moved_shows_itself_what_it_is(tmp_path: Path) -> None:
    moved = made(tmp_path / "model", "publish", "README.md", "golden/00.jpg").rename(tmp_path / "moved")
    require_replaceable(moved, "publish", {"README.md", "golden/00.jpg"})
    with pytest.raises(InputError, match=r"moved: holds README\.md and would be replaced as a whole"):
        require_replaceable(moved, "publish", {"golden/00.jpg"})


def test_the_output_of_another_stage_is_not_ones_own(tmp_path: Path) -> None:
    report = made(tmp_path / "out", "evaluate", "metrics.json")
    with pytest.raises(InputError, match=r"holds metrics\.json"):
        require_replaceable(report, "publish", ())


@pytest.mark.parametrize("name", ["mine.txt", "golden/mine.txt", "deep/er/mine.txt", ".git/HEAD", "mine/"])
def test_the_first_file_of_others_is_named(name: str, tmp_path: Path) -> None:
    model = made(tmp_path / "model", "publish", "README.md", "golden/00.jpg")
    place = model / name
    if name.endswith("/"):
        place.mkdir()
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    (model / "zebra.txt").touch()
    first = "zebra.txt" if "/" in name else name  # those of a folder come before those of the folders in it
    with pytest.raises(InputError, match=f"holds {first} and would"):
        require_replaceable(model, "publish", ())
    (model / "zebra.txt").unlink()
    with pytest.raises(InputError, match=f"holds {name.rstrip('/')} and would"):
        require_replaceable(model, "publish", ())


def test_links_to_folders_are_not_followed_and_count(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photographs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="holds photographs"):
        require_replaceable(tmp_path / "out", "publish", ())


def test_a_file_does_not_make_way_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        require_replaceable(tmp_path / "report", "evaluate", ())
