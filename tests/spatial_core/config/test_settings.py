"""Settings: precedence, old files, refusals, digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.config.settings import Settings, load_settings, section_models
from spatial_core.errors import ConfigError

# Section and key names of the earlier pipeline's config.toml, with values of ours.
EARLIER = """
[global]
seed = 7
log_dir = "/scratch/logs"
[paths]
intermediates_dir = "/scratch/intermediates"
embeddings_dir = "/scratch/embeddings"
merged_dir = "/scratch/merged"
fingerprints_dir = "/scratch/fingerprints"
train_parquet_path = "/scratch/merged/train.parquet"
val_parquet_path = "/scratch/elsewhere/val.parquet"
difficulty_metadata_path = "/scratch/difficulty/difficulty_metadata.parquet"
checkpoint_dir = "/scratch/checkpoints"
temp_dir = "/scratch/tmp"
log_file = "/scratch/logs/one.log"
[embedding_model]
model_name = "facebook/dinov3-vit7b16-pretrain-lvd1689m"
pooling_type = "pooler_output"
batch_size = 16
[training_model]
input_dim = 4096
output_dim = 256
[training]
num_epochs = 50
save_every_n_epochs = 5
validate_every_n_epochs = 1
early_stopping_patience = 3
retrieval_metric_top_k = [1, 5, 10, 100, 1000]
retrieval_metric_max_queries = 4096
retrieval_metric_per_building_limit = 4
best_training_trial_name_pattern = ".*-trial-.*"
best_training_metric_name = "val/retrieval_recall@100"
[data]
train_ratio = 0.7
val_ratio = 0.15
test_ratio = 0.15
neighbors = 150
k0_for_local_scale = 50
sample_fraction_for_bands = 0.03
pca_components = 32
[infrastructure]
distance_dtype = "float32"
batch_size = 100000
row_group_size = 50000
[fingerprints]
image_size = 16
[logging]
log_every_n_batches = 100
wandb_enabled = true
wandb_project = "buildings"
wandb_mode = "online"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_a_file_of_the_earlier_pipeline_loads_unchanged(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, EARLIER), environ={})
    assert settings.seed == 7
    assert settings.head.input_dim == 4096
    assert settings.locations.embeddings_dir == Path("/scratch/embeddings")
    notes = " ".join(settings.notices())
    assert "wandb_project names the MLflow experiment" in notes
    assert "wandb_mode is not used" in notes
    assert "val_parquet_path is not used" in notes
    assert "train_parquet_path" not in notes
    assert "paths.temp_dir is not used" in notes


def test_later_sources_win(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nnum_epochs = 3\nmargin = 0.2\nbatch_size = 8\n")
    environ = {"SPATIAL_TRAINING__MARGIN": "0.3", "SPATIAL_TRAINING__BATCH_SIZE": "16", "SPATIAL_REAL_DATA": "/x"}
    settings = load_settings(path, ["training.batch_size=32"], environ)
    assert (settings.training.num_epochs, settings.training.margin, settings.training.batch_size) == (3, 0.3, 32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "unknown key training.lerning_rate; did you mean training.learning_rate?"),
        ("trainig.margin=1", "unknown section trainig; did you mean training?"),
        ("training.neighbors=3", "did you mean data.neighbors?"),
        ("data.train_ratio=0.9", "must be 1"),
        ("data.neighbors=20", "k0_for_local_scale 50 must be below neighbors 20"),
        ("training.num_epochs=0", "training.num_epochs"),
        ("margin=3", "expected section.key=value"),
    ],
)
def test_wrong_settings_are_refused_with_a_hint(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace(".", r"\.")):
        load_settings(overrides=[override], environ={})


def test_a_fault_is_blamed_on_where_it_was_set(tmp_path: Path) -> None:
    path = write(tmp_path, "[training]\nmargin = 0.2\n")
    with pytest.raises(ConfigError, match=r"^--set training\.marign: unknown key"):
        load_settings(path, ["training.marign=1"], {})
    with pytest.raises(ConfigError, match=r"^SPATIAL_DATA__NEIGHBORS: .*k0_for_local_scale"):
        load_settings(path, environ={"SPATIAL_DATA__NEIGHBORS": "20"})
    with pytest.raises(ConfigError, match=f"^{path}: "):
        load_settings(write(tmp_path, "[training]\nmarign = 0.2\n"), environ={})


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    named = {"SPATIAL_CONFIG": str(write(tmp_path, "[training]\nmargin = 0.25\n"))}
    assert load_settings(environ=named).training.margin == 0.25
    assert load_settings(overrides=["training.margin=0.5"], environ=named).training.margin == 0.5


def test_unknown_environment_keys_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        load_settings(environ={"SPATIAL_TRAINING__EPOCHS": "3"})


@pytest.mark.parametrize("text", ["[training", "\x00"])
def test_broken_files_name_the_file(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=str(path)):
        load_settings(path, environ={})


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, '[paths]\ndata_dir = "lake"\n'), environ={})
    assert settings.locations.raw_dir == tmp_path / "lake" / "raw"


def test_the_digest_is_about_results_not_places() -> None:
    plain = load_settings(environ={})
    moved = load_settings(
        overrides=["paths.data_dir=/elsewhere", "infrastructure.threads=7", "global.log_dir=/l"], environ={}
    )
    other = load_settings(overrides=["training.margin=0.4"], environ={})
    assert plain.digest == moved.digest
    assert plain.digest != other.digest


def test_settings_survive_the_way_to_another_process(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, EARLIER), ["training.margin=0.4", "training_model.hidden_dim=64"], {})
    arrived = Settings.from_json(settings.to_json())
    assert arrived == settings
    assert arrived.locations == settings.locations
    assert arrived.head == settings.head


def test_head_keys_in_training_win() -> None:
    settings = load_settings(overrides=["training_model.dropout=0.2", "training.dropout=0.3"], environ={})
    assert settings.head.dropout == 0.3


def test_what_is_picked_is_what_counts() -> None:
    settings = load_settings(Path("tests/data/defaults.toml"), ["global.seed=5", "training.dropout=0.3"], {})
    assert settings.pick("training.seed", "training_model.dropout") == {
        "training.seed": 5,
        "training_model.dropout": 0.3,
    }
    assert load_settings(Path("tests/data/defaults.toml"), ["training.seed=0"], {}).pick("training.seed") == {
        "training.seed": 0
    }


def test_every_setting_says_what_it_means() -> None:
    for section, model in section_models().items():
        for key, field in model.model_fields.items():
            assert field.description, f"{section}.{key} has no description"
