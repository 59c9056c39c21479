"""Stage `train`: splits and difficulty table -> checkpoints of a projection head.

`checkpoint_best` is replaced whenever validation improves and is a valid checkpoint at any time, but counts as
finished only with its manifest, which is written last. How runs are interrupted and continued: see `session`; how
several processes train together: see `ranks`. How many they are changes nothing but rounding and dropout masks, so it
is told in the report and is no part of what identifies a checkpoint.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spatial_core.config.sections import TrainingModelSection
from spatial_core.config.settings import Settings
from spatial_core.errors import ConfigError, InputError
from spatial_core.interruption import resumable
from spatial_core.metric_learning.best_trial import Advice, read_advice
from spatial_core.metric_learning.checkpoint import BEST, FINAL, record_path
from spatial_core.metric_learning.features import Split
from spatial_core.metric_learning.following import follow
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.metric_learning.ranks import Ranks, gathered
from spatial_core.metric_learning.session import Observer, Session
from spatial_core.metric_learning.trainer import Trainer, arithmetic
from spatial_core.metric_learning.training_data import load_training_data, training_seed
from spatial_core.metric_learning.training_state import STATE
from spatial_core.metric_learning.validation import Selection
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.hardware import usable_cores
from spatial_core.storage.provenance import (
    Provenance,
    artifact_digest,
    finished,
    read_manifest,
    record_artifact,
    stage_key,
)
from spatial_core.storage.scratch import scratch_folder

STAGE = "train"
CODE_VERSION = "1"
# Keys of [training] that no number in a checkpoint depends on, or that are recorded in another form.
_UNUSED = {"best_training_trial_name_pattern", "best_training_metric_name", "resume_from_checkpoint", "seed"}


def train_projector(
    merged_dir: Path,
    difficulty: Path,
    output_dir: Path,
    settings: Settings,
    progress: Progress = silent,
    *,
    study: Path | None = None,
    observer: Observer | None = None,
) -> Report:
    """Train the projection head.

    Args:
        merged_dir: folder with `train.parquet` and `val.parquet`.
        difficulty: difficulty table; images it does not list get random negatives.
        output_dir: folder of checkpoints: `checkpoint_best`, `checkpoint_final` and every few epochs
            `checkpoint_epoch_N`, each as .safetensors and .json, and `training_state.safetensors`.
        settings: [training], [training_model], data.min_negative_distance_m and the seed.
        progress: called with triplets seen.
        study: `study.json` of a tuning study, whose best trial's hyper-parameters take the place of the settings'.
        observer: told of every validation, and may end training early; a finished run is not shown to it again.

    Returns:
        Report in training images; its artifact is `checkpoint_best.safetensors`.

    Raises:
        InputError: if the splits have no two buildings to form triplets from, or a file is missing.
        ConfigError: if settings do not fit the data or each other.
        ArtifactError: if inputs are damaged, or train and val come from different models.
        ModelError: if training diverges, or the checkpoint to start from does not fit.
        ArtifactBusy: if another run is writing the folder.
        Interrupted: if the run was asked to stop; its state after the last epoch is kept.
        RankLost: if another process of the run is gone.
    """
    started = time.perf_counter()
    Selection(settings.training.selection_metric)  # refused before anything is read
    artifact = output_dir / BEST
    with gathered() as ranks, contextlib.ExitStack() as held, resumable():
        request = ranks.first(lambda: _request(merged_dir, difficulty, output_dir, settings, study))
        digest, settings = settings.digest, request.settings
        if (done := ranks.first(lambda: _claim(held, artifact, request.key))) is not None:
            return done
        device = ranks.all(lambda: _device(settings.infrastructure.device, ranks))
        ranks.use(device)
        threads = settings.infrastructure.threads or max(1, usable_cores() // ranks.local_size)
        with arithmetic(settings.training.precision, device, threads, training_seed(settings)):
            room = scratch_folder() or output_dir
            data = ranks.all(lambda: load_training_data(merged_dir, difficulty, room, settings, device))
            head = ProjectorConfig.from_head(settings.head, data.train.dim)
            trainer = Trainer(Projector(head).to(device), data.train, data.sampler, settings.training, ranks)
            if not ranks.is_first:
                report: Report = follow(trainer, ranks, training_seed(settings))
                return report

            def lead() -> Report:
                provenance = Provenance(
                    STAGE,
                    CODE_VERSION,
                    digest,
                    request.config,
                    request.inputs,
                    model=data.backbone.model,
                    preprocessing=data.backbone.preprocessing,
                )
                session = Session(
                    output_dir, settings, trainer, data, provenance, start=request.start, observer=observer, ranks=ranks
                )
                details = session.run(progress)
                if request.advice is not None:
                    details["study"] = request.advice.describe(request.inputs)
                report = _report(artifact, data.train, details, started)
                record_artifact(artifact, request.key, provenance, report)
                return report

            return ranks.lead(lead)


@dataclass(frozen=True)
class _Request:
    """What is asked for.

    Args:
        settings: the given ones, with the best trial's hyper-parameters where there is a study.
        advice: what the study says.
        start: checkpoint to start from.
        config: the settings that count, by name.
        inputs: the inputs that count.
        key: of all these.
    """

    settings: Settings
    advice: Advice | None
    start: Path | None
    config: dict[str, Any]
    inputs: dict[str, str]
    key: str


def _request(merged_dir: Path, difficulty: Path, output_dir: Path, settings: Settings, study: Path | None) -> _Request:
    start = _start(settings, output_dir)
    inputs = training_inputs(merged_dir, difficulty)
    if start is not None:
        inputs["resume_from_checkpoint"] = sha256_file(start)
    advice = None if study is None else read_advice(study)
    if advice is not None:
        settings = advice.apply(settings)
        inputs["tuning_study"] = advice.sha256
    config = training_config(settings)
    return _Request(settings, advice, start, config, inputs, stage_key(STAGE, CODE_VERSION, config, inputs))


def _claim(held: contextlib.ExitStack, artifact: Path, key: str) -> Report | None:
    """Take the artifact's lock; returns the report if there is nothing to do."""
    held.enter_context(exclusive(artifact))
    done = finished(artifact, key)
    return done if record_path(artifact).is_file() else None


def _report(artifact: Path, train: Split, details: dict[str, Any], started: float) -> Report:
    images = int(train.has_partner.sum())
    return Report(
        stage=STAGE,
        artifact=artifact,
        rows=images,
        rows_in=train.rows_in_file,
        kept=images,
        rejected={
            "not_sampled": train.rows_in_file - len(train.label),
            "only_image_of_building": len(train.label) - images,
        },
        seconds=time.perf_counter() - started,
        bytes=artifact.stat().st_size,
        unit="training images",
        details=details,
    )


def training_config(settings: Settings) -> dict[str, Any]:
    """The settings that checkpoints depend on, by dotted name; no paths."""
    training = settings.training.model_dump(mode="json")
    own = {name: value for name, value in training.items() if name not in TrainingModelSection.model_fields}
    return {
        **{
            f"training_model.{name}": value
            for name, value in settings.head.model_dump(mode="json").items()
            if name in TrainingModelSection.model_fields
        },
        **{f"training.{name}": value for name, value in own.items() if name not in _UNUSED},
        "training.seed": training_seed(settings),
        "data.min_negative_distance_m": settings.data.min_negative_distance_m,
    }


def training_inputs(merged_dir: Path, difficulty: Path) -> dict[str, str]:
    """Digests of the splits and of the difficulty table, by name.

    Raises:
        InputError: if there is no difficulty table.
        DigestMismatch: if one changed after it was made.
    """
    if read_manifest(merged_dir) is not None:
        inputs = {"merged_splits": artifact_digest(merged_dir)}
    else:  # the folder of another program may hold anything
        paths = [merged_dir / f"{name}.parquet" for name in ("train", "val")]
        inputs = {path.stem: artifact_digest(path) for path in paths if path.exists()}
    inputs["difficulty_metadata"] = artifact_digest(difficulty)
    return inputs


def _start(settings: Settings, output_dir: Path) -> Path | None:
    """The checkpoint to start from, absolute."""
    named = settings.training.resume_from_checkpoint
    if named is None:
        return None
    path = (settings.base_dir / named.expanduser()).resolve()
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint (training.resume_from_checkpoint)")
    if path.parent == output_dir.resolve() and path.name in {BEST, FINAL, STATE}:
        raise ConfigError(f"{path}: training would overwrite the checkpoint it starts from; name another output folder")
    return path


def _device(name: str, ranks: Ranks) -> torch.device:
    """The device of this rank: of several on one machine, each takes a CUDA device of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"infrastructure.device is {name!r}; it must be auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"infrastructure.device is {name!r}, but torch finds no CUDA device; use auto or cpu")
    if device.type == "cuda" and ranks.local_size > 1:
        if device.index is not None or torch.cuda.device_count() < ranks.local_size:
            raise ConfigError(
                f"infrastructure.device is {name!r} and this machine has {torch.cuda.device_count()} CUDA devices for "
                f"the {ranks.local_size} processes that train on it; name cuda, and start one process a device"
            )
        return torch.device("cuda", ranks.local_rank)
    return device
