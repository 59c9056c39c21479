"""Every setting, by section: its name, unit or meaning, default and bounds. Nothing here reads files.

Sections and names up to `logging` are those of the earlier pipeline's `config.toml`, so such a file loads unchanged
(`config.earlier` moves keys that stood in another section); keys that pipeline did not have are ours. Paths left unset
are derived from `paths.data_dir`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator


class Section(BaseModel):
    """Base: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class GlobalSection(Section):
    """Shared by every stage."""

    seed: int = Field(42, ge=0, description="seed of every random choice")
    log_dir: Path | None = Field(None, description="folder of log files, one a stage; unset keeps none")


class PathsSection(Section):
    """Where artifacts lie. Relative paths are relative to the settings file."""

    data_dir: Path = Field(Path("data"), description="root of the lake; the other paths default to folders in it")
    raw_dir: Path | None = Field(None, description="watched folder of NNNN.tar files; default <data_dir>/raw")
    intermediates_dir: Path | None = Field(None, description="one parquet of validated images a tar")
    fingerprints_dir: Path | None = Field(None, description="one parquet of 16x16 RGB fingerprints a tar")
    embeddings_dir: Path | None = Field(None, description="one parquet of backbone features a tar")
    merged_dir: Path | None = Field(None, description="train, val and test parquet")
    train_parquet_path: Path | None = Field(None, description="accepted for old files; must lie in merged_dir")
    val_parquet_path: Path | None = Field(None, description="accepted for old files; must lie in merged_dir")
    tar_file: Path | None = Field(None, description="accepted for old files; tars are found in raw_dir")
    log_file: Path | None = Field(
        None, description="accepted for old files; each stage has its own file in global.log_dir"
    )
    temp_dir: Path | None = Field(None, description="accepted for old files; nothing is ever extracted")
    difficulty_metadata_path: Path | None = Field(None, description="neighbours and bands of every image")
    checkpoint_dir: Path | None = Field(None, description="projector checkpoints")
    tuning_dir: Path | None = Field(None, description="tuning study, its trials, and the embedded database")
    report_dir: Path | None = Field(None, description="retrieval report (JSON, HTML)")
    model_dir: Path | None = Field(None, description="published Hugging Face model folder")
    drops_dir: Path | None = Field(None, description="watched folder of parquet files of new images")
    final_embeddings_dir: Path | None = Field(None, description="one folder of per-image vectors a drop")
    building_embeddings_dir: Path | None = Field(None, description="one parquet of per-building vectors a drop")
    cluster_usage_path: Path | None = Field(None, description="what every cluster job used and cost")


class ProcessTarSection(Section):
    """tar -> intermediates."""

    tar_name_pattern: str = Field(r"\d{4}\.tar", description="regular expression a tar's whole file name must match")
    max_rejected_fraction: float = Field(
        0.5, ge=0, le=1, description="the check fails above this share of rejected files"
    )
    row_group_size: PositiveInt = Field(50_000, description="rows a row group, and the bound on rows held in memory")


class FingerprintsSection(Section):
    """Small RGB thumbnails that decide visual difficulty."""

    image_size: PositiveInt = Field(16, description="side of the square fingerprint, pixels")
    decode: Literal["exact", "scaled"] = Field("exact", description="full-size decode, or faster scaled JPEG decode")


class EmbeddingModelSection(Section):
    """Backbone that turns an image into features."""

    model_name: str = Field(
        "seeded:dinov2-demo",
        description="hub id, local folder, or seeded:<name> for a small built-in model with seeded random weights",
    )
    revision: str | None = Field(
        None,
        description="commit (or tag) of a hub model; unset, the hub's newest is used and its commit recorded. "
        "For a local folder, the digest its files must have",
    )
    pooling_type: Literal["cls_token", "pooler_output"] = Field("cls_token", description="what stands for the image")
    batch_size: PositiveInt = Field(16, description="images a forward pass; halved when memory runs out")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="arithmetic of the forward pass; tf32 keeps fp32 weights and rounds the factors of matrix products "
        "where the device gains by it",
    )
    vector_dtype: Literal["float32", "float16"] = Field("float32", description="type of the stored vectors")
    piece_rows: PositiveInt = Field(2048, description="rows a resumable piece; a killed partition redoes at most one")
    compile: bool = Field(False, description="torch.compile the model (CUDA)")
    trust_remote_code: bool = Field(False, description="run code from the model repository; needs a commit as revision")


class TrainingModelSection(Section):
    """Projection head."""

    input_dim: int | None = Field(None, description="feature width; default: that of the training data")
    hidden_dim: PositiveInt = Field(512, description="width of the first hidden layer")
    num_hidden_layers: PositiveInt = Field(1, description="hidden layers")
    hidden_dim_multiplier: PositiveFloat = Field(1.0, description="width of a hidden layer relative to the one before")
    output_dim: PositiveInt = Field(256, description="embedding width")
    activation: Literal["gelu", "relu", "silu"] = Field("gelu", description="activation of hidden layers")
    dropout: float = Field(0.1, ge=0, le=1, description="dropout probability")
    use_residual: bool = Field(True, description="add a linear map of the input to the output")
    use_layer_norm: bool = Field(True, description="LayerNorm after each linear layer")


class TrainingSection(TrainingModelSection):
    """Triplet training. Head settings may also be given here, as the earlier pipeline allowed; see `Settings`."""

    batch_size: PositiveInt = Field(256, description="triplets a step")
    num_epochs: PositiveInt = Field(50, description="passes over all anchors")
    learning_rate: PositiveFloat = Field(1e-4, description="Adam step size")
    weight_decay: float = Field(1e-5, ge=0, description="Adam L2 penalty")
    margin: PositiveFloat = Field(0.5, description="triplet margin")
    loss_distance: Literal["euclidean", "cosine"] = Field("euclidean", description="distance inside the loss")
    precision: Literal["fp32", "tf32", "bf16"] = Field("fp32", description="arithmetic of the training step")
    standardize_features: bool = Field(
        True,
        description="train on centred features of unit scale; the head's first layers absorb it, so checkpoints apply "
        "to raw features either way. The earlier pipeline trained on raw features (false)",
    )
    ucb_exploration_constant: float = Field(2.0, ge=0, description="UCB c: weight of the exploration term")
    ucb_warmup_samples: int = Field(1000, ge=0, description="rewarded samples drawn uniformly before UCB steers")
    ucb_reward: Literal["negative_loss", "active_fraction"] = Field(
        "active_fraction",
        description="reward of a band: minus the loss (earlier pipeline, prefers easy bands) or the share of its "
        "triplets that violate the margin and so still give gradient",
    )
    seed: int | None = Field(None, description="overrides global.seed")
    save_every_n_epochs: PositiveInt = Field(5, description="keep checkpoint_epoch_N every N epochs")
    validate_every_n_epochs: PositiveInt = Field(1, description="validate every N epochs")
    selection_metric: str = Field("recall@1", description="recall@k (highest wins) or loss (lowest wins) on val")
    resume_from_checkpoint: Path | None = Field(None, description="checkpoint to continue from; default: own latest")
    early_stopping_patience: int = Field(0, ge=0, description="validations without gain before stopping, 0 = off")
    retrieval_metric_top_k: tuple[PositiveInt, ...] = Field((1, 5, 10, 100, 1000), description="k of recall@k")
    retrieval_metric_max_queries: PositiveInt = Field(4096, description="query images of a validation")
    retrieval_metric_per_building_limit: int = Field(4, ge=0, description="queries a building, 0 = no cap")
    sample_fraction: float | None = Field(None, gt=0, le=1, description="train on this share of buildings")
    sample_buildings: int | None = Field(None, gt=0, description="train on this many buildings; wins over the share")
    val_sample_fraction: float | None = Field(None, gt=0, le=1, description="validate on this share of buildings")
    val_sample_buildings: int | None = Field(None, gt=0, description="validate on this many buildings")
    best_training_trial_name_pattern: str = Field(".*-trial-.*", description="tuning runs to choose from")
    best_training_metric_name: str = Field("val/retrieval_recall@100", description="metric that ranks tuning runs")


class DataSection(Section):
    """Splits and difficulty."""

    train_ratio: float = Field(0.7, ge=0, le=1, description="share of buildings")
    val_ratio: float = Field(0.15, ge=0, le=1, description="share of buildings")
    test_ratio: float = Field(0.15, ge=0, le=1, description="share of buildings")
    split_strategy: Literal["building", "spatial_block"] = Field(
        "building", description="unit that is hashed into a split: a building, or all buildings of a grid cell"
    )
    block_size_m: PositiveFloat = Field(500.0, description="side of a spatial_block grid cell, metres")
    batch_size: PositiveInt = Field(100_000, description="upper bound on rows in memory while merging")
    neighbors: PositiveInt = Field(150, description="neighbours kept an image")
    k0_for_local_scale: PositiveInt = Field(50, description="neighbour rank whose distance is the local scale")
    sample_fraction_for_bands: float = Field(0.03, ge=0, le=1, description="share of images that calibrate band edges")
    pca_components: PositiveInt = Field(32, description="fingerprint dimensions searched")
    min_negative_distance_m: float = Field(
        30.0, ge=0, description="buildings nearer than this on the ground are never negatives of each other; 0 = off"
    )
    search: Literal["auto", "exact", "approximate"] = Field("auto", description="auto: exact up to search_exact_rows")
    search_exact_rows: PositiveInt = Field(300_000, description="largest CPU data set that auto searches exactly")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = self.train_ratio + self.val_ratio + self.test_ratio
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train_ratio + val_ratio + test_ratio must be 1, they add up to {total:g}")
        if self.k0_for_local_scale >= self.neighbors:
            raise ValueError(f"k0_for_local_scale {self.k0_for_local_scale} must be below neighbors {self.neighbors}")
        return self


class InfrastructureSection(Section):
    """Devices and blocks. Nothing here changes results beyond rounding."""

    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(0, ge=0, description="decode and compute threads; 0 = the cores this process may use")
    distance_dtype: Literal["float32", "float64"] = Field("float32", description="type of the visual distances")
    batch_size: PositiveInt = Field(
        100_000,
        description="anchors a block of the neighbour search, at most; data.batch_size where only that is given",
    )
    row_group_size: PositiveInt = Field(50_000, description="rows a row group of the difficulty table")


class EvaluationSection(Section):
    """Retrieval report."""

    max_queries: PositiveInt = Field(4096, description="query images a split")
    per_building_limit: int = Field(4, ge=0, description="queries a building, 0 = no cap")
    bootstrap_samples: PositiveInt = Field(1000, description="resamples (by building) of the confidence intervals")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    gallery_queries: int = Field(12, ge=0, description="queries shown right, and as many wrong")
    map_points: PositiveInt = Field(4000, description="images in the 2-D map, at most")


class PublishingSection(Section):
    """Hugging Face model."""

    include_backbone: bool = Field(True, description="weights of the backbone inside, or projector only")
    repo_id: str | None = Field(None, description="hub repository to push to; nothing is pushed when unset")
    private: bool = Field(True, description="create the hub repository private")
    license: str = Field("auto", description="SPDX id of the card; auto follows the backbone's licence")
    golden_images: PositiveInt = Field(4, description="images whose vectors are shipped and checked on load")


class InferenceSection(Section):
    """New images -> vectors."""

    batch_size: PositiveInt = Field(32, description="images a forward pass; halved when memory runs out")
    read_batch_size: PositiveInt = Field(1000, description="rows a part file")
    filter_valid: bool = Field(True, description="skip rows whose is_valid is false, counting them")
    limit: int | None = Field(None, gt=0, description="embed at most this many rows")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="arithmetic of the forward pass")


class LoggingSection(Section):
    """Tracking and logs."""

    log_every_n_batches: PositiveInt = Field(100, description="training progress interval")
    mlflow_tracking_uri: str | None = Field(None, description="MLflow server or database; default sqlite in data_dir")
    mlflow_experiment: str | None = Field(
        None, description="experiment; default wandb_project, else spatial-embeddings"
    )
    report_port: int = Field(
        3001, ge=1, le=65535, description="port of 127.0.0.1 that `spatial report` shows the retrieval report on"
    )
    wandb_enabled: bool = Field(True, description="accepted for old files; false also turns MLflow tracking off")
    wandb_project: str | None = Field(None, description="accepted for old files: names the MLflow experiment")
    wandb_run_name: str | None = Field(None, description="accepted for old files: names the MLflow run")
    wandb_mode: Literal["online", "offline"] | None = Field(None, description="accepted for old files; not used")


class WatchSection(Section):
    """Sensors on raw_dir and drops_dir."""

    budget_s: PositiveFloat = Field(20.0, description="seconds of work a tick; the rest waits for the next")
    drop_name_pattern: str = Field(
        r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.parquet", description="regular expression a drop's file name must match"
    )


class DemoSection(Section):
    """The procedural city of `spatial demo-data`."""

    tars: PositiveInt = Field(4, le=98, description="raw tars, one a district")
    buildings_per_tar: PositiveInt = Field(150, description="facade points a tar")
    min_views: PositiveInt = Field(2, description="images a facade point, at least")
    max_views: PositiveInt = Field(7, le=8, description="images a facade point, at most")
    image_size_px: int = Field(640, ge=64, description="side of the JPEGs, pixels")
    styles: PositiveInt = Field(12, description="architectural styles; buildings of one style look alike")
    drop_images: PositiveInt = Field(60, description="images in the dropped parquet")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_views > self.max_views:
            raise ValueError(f"min_views {self.min_views} is above max_views {self.max_views}")
        return self
