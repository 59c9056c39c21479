"""Keys of the earlier pipeline in every section it accepted them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ConfigError

# (section, key, a value in TOML) -> the setting it must be read as. All pairs that the earlier pipeline accepted and
# that do not stand where we have them.
ELSEWHERE = [
    *[("data", key, value, f"infrastructure.{key}") for key, value in (
        ("distance_dtype", "'float64'"), ("row_group_size", "7"),
    )],
    *[("infrastructure", key, value, f"data.{key}") for key, value in (
        ("neighbors", "60"), ("k0_for_local_scale", "9"), ("sample_fraction_for_bands", "0.5"), ("pca_components", "5"),
    )],
    *[("paths", key, value, f"{home}.{key}") for key, value, home in (
        ("neighbors", "60", "data"), ("k0_for_local_scale", "9", "data"), ("pca_components", "5", "data"),
        ("sample_fraction_for_bands", "0.5", "data"), ("distance_dtype", "'float64'", "infrastructure"),
        ("row_group_size", "7", "infrastructure"), ("image_size", "8", "fingerprints"),
        ("model_name", "'some/model'", "embedding_model"), ("pooling_type", "'pooler_output'", "embedding_model"),
        ("num_epochs", "3", "training"), ("margin", "0.3", "training"), ("hidden_dim", "64", "training_model"),
        ("wandb_project", "'p'", "logging"), ("log_every_n_batches", "9", "logging"), ("seed", "5", "global"),
    )],
    *[("training_model", key, value, f"{home}.{key}") for key, value, home in (
        ("batch_size", "32", "training"), ("learning_rate", "0.1", "training"), ("sample_fraction", "0.5", "training"),
        ("retrieval_metric_top_k", "[1, 3]", "training"), ("wandb_run_name", "'r'", "logging"),
        ("seed", "5", "training"), ("checkpoint_dir", "'/c'", "paths"),
    )],
    *[("training", key, value, f"{home}.{key}") for key, value, home in (
        ("wandb_enabled", "false", "logging"), ("wandb_project", "'p'", "logging"),
        ("wandb_mode", "'offline'", "logging"), ("log_every_n_batches", "9", "logging"),
        ("checkpoint_dir", "'/c'", "paths"),
        ("difficulty_metadata_path", "'/d.parquet'", "paths"), ("train_parquet_path", "'/m/train.parquet'", "paths"),
        ("val_parquet_path", "'/m/val.parquet'", "paths"), ("log_file", "'/l'", "paths"),
    )],
    *[("logging", key, value, f"{home}.{key}") for key, value, home in (
        ("num_epochs", "3", "training"), ("early_stopping_patience", "2", "training"), ("dropout", "0.3", "training"),
        ("input_dim", "99", "training"), ("seed", "5", "training"), ("checkpoint_dir", "'/c'", "paths"),
    )],
    *[("data", key, f"'/{key}'", f"paths.{key}") for key in (
        "intermediates_dir", "embeddings_dir", "merged_dir", "fingerprints_dir", "difficulty_metadata_path", "log_file",
    )],
    *[("embedding_model", key, f"'/{key}'", f"paths.{key}") for key in (
        "intermediates_dir", "embeddings_dir", "temp_dir", "log_file",
    )],
    *[("fingerprints", key, f"'/{key}'", f"paths.{key}") for key in (
        "intermediates_dir", "fingerprints_dir", "temp_dir", "log_file",
    )],
    *[("infrastructure", key, f"'/{key}'", f"paths.{key}") for key in ("fingerprints_dir", "difficulty_metadata_path")],
]  # fmt: skip


def load(folder: Path, text: str, *overrides: str, environ: dict[str, str] | None = None) -> Settings:
    path = folder / "config.toml"
    path.write_text(text)
    return load_settings(path, overrides, environ or {})


def value_of(settings: Settings, dotted: str) -> Any:
    return settings.pick(dotted)[dotted]


@pytest.mark.parametrize(("section", "key", "value", "home"), ELSEWHERE, ids=str)
def test_a_key_in_another_section_of_its_job_has_its_effect(
    section: str, key: str, value: str, home: str, tmp_path: Path
) -> None:
    moved = load(tmp_path, f"[{section}]\n{key} = {value}\n")
    name, _, home_key = home.partition(".")
    at_home = load(tmp_path, f"[{name}]\n{home_key} = {value}\n")
    assert value_of(moved, home) == value_of(at_home, home)
    assert value_of(moved, home) != value_of(load(tmp_path, ""), home)
    assert moved.head == at_home.head
    assert moved.digest == at_home.digest
    assert f"{section}.{key} is read as {home}" in moved.notices()
    assert load(tmp_path, "", f"{section}.{key}={value}").digest == at_home.digest


@pytest.mark.parametrize("section", ["data", "embedding_model", "fingerprints", "infrastructure"])
def test_a_seed_of_one_stage_alone_is_reported(section: str, tmp_path: Path) -> None:
    settings = load(tmp_path, f"[global]\nseed = 3\n[{section}]\nseed = 4\n")
    assert settings.seed == 3
    assert f"{section}.seed is not used: global.seed serves every stage but training" in settings.notices()


@pytest.mark.parametrize(
    ("text", "home", "value", "notice"),
    [
        # In the order of the spec's merge, the later section wins.
        (
            "[data]\ndistance_dtype = 'float64'\n[infrastructure]\ndistance_dtype = 'float32'\n",
            "infrastructure.distance_dtype", "float32",
            "data.distance_dtype gives way to infrastructure.distance_dtype",
        ),
        (
            "[data]\nneighbors = 90\n[infrastructure]\nneighbors = 70\n",
            "data.neighbors", 70, "infrastructure.neighbors is read as data.neighbors, and wins over data.neighbors",
        ),
        (
            "[paths]\ndistance_dtype = 'float32'\n[data]\ndistance_dtype = 'float64'\n",
            "infrastructure.distance_dtype", "float64", "paths.distance_dtype gives way to data.distance_dtype",
        ),
        (
            "[training]\nnum_epochs = 3\n[logging]\nnum_epochs = 4\n",
            "training.num_epochs", 4, "logging.num_epochs is read as training.num_epochs, and wins over "
            "training.num_epochs",
        ),
        (
            "[paths]\nfingerprints_dir = '/a'\n[fingerprints]\nfingerprints_dir = '/b'\n",
            "paths.fingerprints_dir", "/b", "fingerprints.fingerprints_dir is read as paths.fingerprints_dir, and wins "
            "over paths.fingerprints_dir",
        ),
        (
            "[fingerprints]\nintermediates_dir = '/a'\n[data]\nintermediates_dir = '/b'\n",
            "paths.intermediates_dir", "/a", "fingerprints.intermediates_dir is read as paths.intermediates_dir, and "
            "wins over data.intermediates_dir",
        ),
    ],
)  # fmt: skip
def test_the_later_section_wins(text: str, home: str, value: Any, notice: str, tmp_path: Path) -> None:
    settings = load(tmp_path, text)
    assert value_of(settings, home) == value
    assert notice in settings.notices()


def test_head_keys_win_in_the_order_of_the_sections(tmp_path: Path) -> None:
    sections = ("paths", "training_model", "training", "logging")
    for last in range(1, len(sections) + 1):
        text = "".join(f"[{name}]\ndropout = 0.{place}\n" for place, name in enumerate(sections[:last]))
        assert load(tmp_path, text).head.dropout == float(f"0.{last - 1}")


def test_one_batch_size_for_all_jobs_that_have_none_of_their_own(tmp_path: Path) -> None:
    settings = load(tmp_path, "[paths]\nbatch_size = 11\n[training]\nbatch_size = 12\n")
    sizes = [settings.data.batch_size, settings.embedding_model.batch_size, settings.training.batch_size]
    assert [*sizes, settings.infrastructure.batch_size] == [11, 11, 12, 11]
    settings = load(tmp_path, "[data]\nbatch_size = 13\n")
    assert (settings.data.batch_size, settings.infrastructure.batch_size) == (13, 13)
    settings = load(tmp_path, "[data]\nbatch_size = 13\n[infrastructure]\nbatch_size = 14\n")
    assert (settings.data.batch_size, settings.infrastructure.batch_size) == (13, 14)
    settings = load(tmp_path, "[infrastructure]\nbatch_size = 14\n", "data.batch_size=15")
    assert (settings.data.batch_size, settings.infrastructure.batch_size) == (15, 14)


def test_later_sources_win_whatever_the_section(tmp_path: Path) -> None:
    text = "[logging]\nnum_epochs = 3\n"
    assert load(tmp_path, text, environ={"SPATIAL_TRAINING__NUM_EPOCHS": "4"}).training.num_epochs == 4
    assert load(tmp_path, text, "training_model.num_epochs=5").training.num_epochs == 5


def test_what_was_moved_survives_the_way_to_another_process(tmp_path: Path) -> None:
    settings = load(tmp_path, "[data]\ndistance_dtype = 'float64'\n[training]\nwandb_project = 'p'\n")
    arrived = Settings.from_json(settings.to_json())
    assert arrived == settings
    assert arrived.notices() == settings.notices()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[data]\ndistance_dtype = 'float16'\n", r"infrastructure\.distance_dtype: .*given as data\.distance_dtype"),
        ("[data]\ndistance_dtyp = 'x'\n", r"unknown key data\.distance_dtyp; did you mean data\."),
        ("[fingerprints]\nneighbors = 3\n", r"unknown key fingerprints\.neighbors; did you mean data\.neighbors\?"),
        ("[global]\nmargin = 3\n", r"unknown key global\.margin; did you mean training\.margin\?"),
        ("training = 3\n", r"training: .*got 3"),
        ("base_dir = 'x'\n", "unknown section base_dir"),
        ("[moved]\nx = 1\n", "unknown section moved"),
    ],
)
def test_what_is_really_wrong_is_refused(text: str, cause: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=cause):
        load(tmp_path, text)


def test_an_override_of_another_section_is_blamed_for_its_fault(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--set data\.distance_dtype: infrastructure\.distance_dtype"):
        load(tmp_path, "", "data.distance_dtype=float16")
