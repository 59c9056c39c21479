"""Names that say what a command writes, and slips."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.cli.outputs import data_set_folder, folder, parquet_file, replaced_folder
from spatial_core.errors import ConfigError


@pytest.mark.parametrize("name", ["out", "run.2", "a.b/c", "v1.0", "march_2026", "made.csv"])
def test_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / "made.csv").mkdir()  # there already: nothing is made by mistake
    assert folder(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name", ["out.csv", "OUT.CSV", "a/b.parquet", "model.safetensors", "0201.tar", "file"])
def test_files_are_no_folders(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="writes a folder"):
        folder(tmp_path / name)


@pytest.mark.parametrize(("given", "meant"), [(".", "a/b"), ("..", "a"), ("../c/..", "a")])
def test_a_folder_has_a_name(given: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "c").mkdir()
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert folder(Path(given)) == tmp_path / meant
    with pytest.raises(ConfigError, match="root of the file system"):
        folder(Path("/"))
    for refusing in (replaced_folder, data_set_folder):
        with pytest.raises(ConfigError, match="the working folder lies there"):
            refusing(Path(given))
    assert replaced_folder(Path("../c")) == Path("../c")


@pytest.mark.parametrize("there", [False, True])
def test_a_data_set_may_be_named_as_the_file_that_it_replaces(there: bool, tmp_path: Path) -> None:
    path = tmp_path / "vectors.parquet"
    if there:
        path.touch()
    assert data_set_folder(path) == path
    with pytest.raises(ConfigError, match="writes a folder"):
        data_set_folder(tmp_path / "vectors.csv")


@pytest.mark.parametrize("name", ["out", "out.csv", "folder.parquet", "."])
def test_a_table_is_a_parquet_file(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    assert parquet_file(tmp_path / "out.parquet") == tmp_path / "out.parquet"
    with pytest.raises(ConfigError, match="writes a"):
        parquet_file(tmp_path / name)
