"""Which settings file counts, and that it is read when used."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_assets.defs.resources import SettingsResource
from spatial_core.errors import ConfigError


def settings_file(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(f"[global]\nseed = {seed}\n")
    return folder / "config.toml"


def test_the_named_file_wins_then_the_variable_then_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPATIAL_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)
    assert SettingsResource().load().seed == 42
    settings_file(tmp_path, 1)
    assert SettingsResource().load().seed == 1
    monkeypatch.setenv("SPATIAL_CONFIG", str(settings_file(tmp_path / "variable", 2)))
    assert SettingsResource().load().seed == 2
    named = SettingsResource(config_file=str(settings_file(tmp_path / "named", 3)))
    assert named.load().seed == 3
    assert named.load().locations.raw_dir == tmp_path / "named" / "data" / "raw"


def test_an_edit_counts_from_the_next_use_on(tmp_path: Path) -> None:
    resource = SettingsResource(config_file=str(settings_file(tmp_path, 1)))
    assert resource.load().seed == 1
    settings_file(tmp_path, 2)
    assert resource.load().seed == 2


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        SettingsResource(config_file=str(tmp_path / "absent.toml")).load()
