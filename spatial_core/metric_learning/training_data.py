"""What a training run reads: the splits, the difficulty table, and how they become a sampler and a validator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, InputError
from spatial_core.metric_learning.bandit import BandUCB
from spatial_core.metric_learning.checkpoint import Backbone
from spatial_core.metric_learning.difficulty_table import TableCounts, chord_of, load_candidates
from spatial_core.metric_learning.features import Sample, Split, load_split, read_backbone
from spatial_core.metric_learning.mining import BuildingRows, TripletSampler
from spatial_core.metric_learning.standardization import Frame
from spatial_core.metric_learning.validation import Validator


@dataclass(frozen=True)
class TrainingData:
    """Everything a run reads.

    Args:
        train: training images.
        sampler: of triplets of `train`.
        validator: measures a head, on val where that can form triplets, else on train.
        validated_on: `val`, or `train` and why.
        table: what became of the difficulty table's neighbours.
        backbone: origin of the features.
        frame: what was done to the features of both splits.
    """

    train: Split
    sampler: TripletSampler
    validator: Validator
    validated_on: str
    table: TableCounts
    backbone: Backbone
    frame: Frame


def load_training_data(
    merged_dir: Path, difficulty: Path, scratch: Path, settings: Settings, device: torch.device
) -> TrainingData:
    """Load the splits, as far as [training] samples them, and the difficulty table.

    Args:
        merged_dir: folder with `train.parquet` and `val.parquet`; val may be missing or too small to validate on.
        difficulty: difficulty table.
        scratch: folder for memory-mapped features.
        settings: sampling, margins, seeds.
        device: training device.

    Raises:
        InputError: if train has no two buildings to form triplets from, or a file is missing.
        ArtifactError: if an input is damaged, or train and val come from different models.
    """
    training, seed, minimum = settings.training, training_seed(settings), settings.data.min_negative_distance_m
    path = merged_dir / "train.parquet"
    train = load_split(path, device, scratch, Sample(training.sample_fraction, training.sample_buildings, seed))
    if not train.can_form_triplets:
        raise InputError(
            f"{path}: {len(train.building_ids)} buildings, {int(train.has_partner.sum())} images with another of "
            f"their building; training needs two buildings, one of them with two images"
        )
    val, validated_on = _validation_split(merged_dir / "val.parquet", train, scratch, settings)
    frame = Frame.of(train.values) if training.standardize_features else Frame.raw(train.dim)
    for split in [train] if val is train else [train, val]:
        if not frame.is_raw:
            frame.apply_(split.values)
    candidates, table = load_candidates(
        difficulty,
        train.image_ids,
        train.building_ids,
        train.label,
        train.has_partner,
        positions=train.positions,
        min_distance_m=minimum,
    )
    sampler = TripletSampler(
        BuildingRows.of(torch.from_numpy(train.label).to(device), len(train.building_ids)),
        candidates.to(device),
        BandUCB(training.ucb_exploration_constant, training.ucb_warmup_samples, device),
        torch.Generator(device).manual_seed(seed),
        positions=None if train.positions is None else torch.from_numpy(train.positions).to(device),
        min_chord=chord_of(minimum),
    )
    validator = Validator(val, difficulty, training, min_distance_m=minimum, seed=seed)
    return TrainingData(train, sampler, validator, validated_on, table, read_backbone(path), frame)


def training_seed(settings: Settings) -> int:
    """The seed of a training run: its own, or the global one."""
    return settings.seed if settings.training.seed is None else settings.training.seed


def _validation_split(path: Path, train: Split, scratch: Path, settings: Settings) -> tuple[Split, str]:
    if not path.exists():
        return train, f"train (there is no {path.name})"
    training = settings.training
    sample = Sample(training.val_sample_fraction, training.val_sample_buildings, training_seed(settings))
    val = load_split(path, train.device, scratch, sample)
    if not val.can_form_triplets:
        return train, f"train (val has {len(val.building_ids)} buildings and {len(val.label)} images)"
    if val.dim != train.dim or read_backbone(path) != read_backbone(train.path):
        raise ArtifactError(f"{train.path} and {path} hold features of different models; run stage 'merge' again")
    return val, "val"
