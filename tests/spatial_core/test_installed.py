"""Which code this is: the same answer for the same files, wherever they lie, and another for any change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from spatial_core.installed import PACKAGES, Installed, installed, root_folder, source_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout with the files that count, and some that do not."""
    folder = tmp_path / "checkout"
    for path in source_files(ROOT):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    (folder / "spatial_core" / "__pycache__").mkdir()
    (folder / "spatial_core" / "__pycache__" / "report.cpython-311.pyc").write_text("compiled")
    (folder / "spatial_core" / "notes.swp").write_text("an editor's")
    return folder


def test_a_copy_is_the_same_code_and_any_change_is_not(copy: Path) -> None:
    here = installed(ROOT)
    assert installed(copy) == here and len(here.digest) == 64
    seen = {here.digest}
    for change in ("content", "name", "removed"):
        path = copy / "spatial_core" / "report.py"
        if change == "content":
            path.write_text(path.read_text() + "\n")
        elif change == "name":
            path.rename(path.with_name("reports.py"))
        else:
            (copy / "spatial_core" / "evaluation" / "page.html").unlink()
        seen.add(installed(copy).digest)
    assert len(seen) == 4


def test_the_version_is_that_of_the_checkout(copy: Path) -> None:
    project = copy / "pyproject.toml"
    project.write_text(project.read_text().replace('version = "', 'version = "9.'))
    assert installed(copy).version == f"9.{installed(ROOT).version}"
    assert installed(copy).digest == installed(ROOT).digest


def test_it_answers_without_any_of_the_dependencies() -> None:
    """An interpreter that has nothing but the packages says so within a moment, as on a node with half a set-up."""
    code = "import runpy; runpy.run_module('spatial_core.installed', run_name='__main__')"
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"]
    said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert Installed.from_json(said) == installed()
    assert root_folder() == ROOT


@pytest.mark.parametrize("text", ["", "null", "{}", '{"version": "1"}', "[1, 2]", "0.1.0"])
def test_what_is_no_answer_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a version|Expecting|Extra data"):
        Installed.from_json(text)


def test_an_installation_gets_every_file_that_counts() -> None:
    """What the digest covers is what the build configuration packs: else no installed copy would ever be the same."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {name.rstrip("*") for name in tool["packages"]["find"]["include"]} == set(PACKAGES)
    suffixes = {Path(pattern).suffix or Path(pattern).name for pattern in tool["package-data"]["*"]} | {".py"}
    found = {path.suffix for path in source_files(ROOT)}
    assert found <= suffixes | {".typed"}
    for path in source_files(ROOT):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} is no package, so it would not be installed"
    assert json.loads(installed().to_json())["digest"] == installed().digest
