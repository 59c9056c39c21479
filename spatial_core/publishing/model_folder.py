"""Checkpoint -> a Hugging Face model folder that plain transformers loads, with everything needed to trust it.

The folder is written beside its destination, loaded again from its own files by plain transformers, and compared with
the path the head was trained on (this package's preprocessing, backbone and head) on seeded pictures. Only when both
give the same vectors does it take its name. Its bytes depend on checkpoint, backbone, report and settings alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from spatial_core.backbones.loading import Backbone
from spatial_core.backbones.model_source import ModelSource
from spatial_core.backbones.seeded import PREFIX
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError, ConfigError, InputError, ModelError
from spatial_core.metric_learning.checkpoint import Checkpoint, load_checkpoint
from spatial_core.publishing import assembly
from spatial_core.publishing.backbone_source import find_backbone, load_found
from spatial_core.publishing.card import CardFacts, Evaluation, read_evaluation, render_card
from spatial_core.publishing.hub import push_model
from spatial_core.publishing.integrity import MANIFEST, read_file_digests, write_file_digests
from spatial_core.publishing.licence import Licence, choose_licence
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import atomic_directory, exclusive
from spatial_core.storage.provenance import Provenance, finished, record_artifact, stage_key
from spatial_core.storage.replaceable import require_replaceable

STAGE = "publish"
CODE_VERSION = "1"
_STEPS = 5
_COMMIT_LENGTH = 40
_NO_METRICS = "the model card has no metrics: --report names the folder of `spatial evaluate` that has them"


def publish_model(
    checkpoint: Path,
    output_dir: Path,
    settings: Settings,
    progress: Progress = silent,
    report_dir: Path | None = None,
) -> Report:
    """Write the model folder, and push it when `publishing.repo_id` is set.

    Args:
        checkpoint: of the head; its record names the backbone. One of the earlier pipeline, which names none, is
            taken to belong to the backbone of `[embedding_model]`.
        output_dir: the folder; replaced as a whole, so it may hold nothing but an earlier model.
        settings: [publishing] and [embedding_model] matter here.
        progress: told about the steps.
        report_dir: folder of the evaluation stage; without one the card says that the model was not evaluated.

    Returns:
        A report in files; `details["golden"]` says how closely plain transformers reproduced the training path.

    Raises:
        ModelError: if head and backbone do not fit, or the folder does not reproduce the golden vectors; nothing is
            published then.
        InputError: if `output_dir` holds other files, or `report_dir` no metrics.
        ArtifactError: if the evaluation report is of another checkpoint.
        ConfigError: if a push is asked for that the backbone's licence or a missing token does not allow.
        HubError: if the push failed; the local folder stands.
    """
    started = time.monotonic()
    job = _Job.prepare(checkpoint, settings, report_dir)
    with exclusive(output_dir):
        report = finished(output_dir, job.key)
        if report is None:
            require_replaceable(output_dir, STAGE, _proven(output_dir))
            report = _write(output_dir, job, progress, started)
    if settings.publishing.repo_id is None:
        return report
    pushed = push_model(output_dir, settings.publishing.repo_id, private=settings.publishing.private, progress=progress)
    return replace(report, details={**report.details, "hub": asdict(pushed)})


@dataclass(frozen=True)
class _Job:
    """Everything the folder follows from.

    Args:
        head: the checkpoint.
        source: where the backbone's files are.
        pooling_type: what the head was trained on.
        evaluation: figures for the card.
        settings: the whole tree.
    """

    head: Checkpoint
    source: ModelSource
    pooling_type: str
    evaluation: Evaluation
    settings: Settings

    @classmethod
    def prepare(cls, checkpoint: Path, settings: Settings, report_dir: Path | None) -> _Job:
        head = load_checkpoint(checkpoint, settings.head)
        recorded = head.backbone.model
        source = find_backbone(recorded.get("id"), recorded.get("revision"), settings)
        pooling_type = recorded.get("pooling_type", settings.embedding_model.pooling_type)
        return cls(head, source, pooling_type, read_evaluation(report_dir, head.weights_sha256), settings)

    @property
    def config(self) -> dict[str, Any]:
        names = ("include_backbone", "license", "golden_images", "repo_id")
        return self.settings.pick(*(f"publishing.{name}" for name in names), "global.seed")

    @property
    def inputs(self) -> dict[str, str]:
        digests = {"checkpoint": self.head.weights_sha256, "backbone": self.source.revision}
        return digests | ({"retrieval_report": self.evaluation.sha256} if self.evaluation.sha256 else {})

    @property
    def key(self) -> str:
        return stage_key(STAGE, CODE_VERSION, {**self.config, "pooling_type": self.pooling_type}, self.inputs)


def _write(output_dir: Path, job: _Job, progress: Progress, started: float) -> Report:
    settings = job.settings.publishing
    progress(0, _STEPS, "loading the backbone")
    backbone = load_found(job.source, job.pooling_type, job.settings)
    _demand_fit(job.head, backbone)
    licence = choose_licence(settings.license, backbone.family, backbone.folder)
    if settings.repo_id and settings.include_backbone and not licence.complete:
        raise ConfigError(
            f"publishing.repo_id is set, but {backbone.folder.name} holds no licence text, and {licence.name} weights "
            "may only be passed on with it: put LICENSE.md beside them, or set publishing.include_backbone = false"
        )
    with atomic_directory(output_dir) as folder:
        progress(1, _STEPS, "writing weights and code")
        assembly.write_model(folder, job.head.projector, backbone, include_backbone=settings.include_backbone)
        assembly.write_preprocessor(folder, backbone.preprocessing, assembly.processor_type(backbone.folder))
        progress(2, _STEPS, "computing golden vectors")
        assembly.make_golden(folder, job.head.projector, backbone, seed=job.settings.seed, count=settings.golden_images)
        (folder / "LICENSE").write_text(licence.text)
        (folder / "README.md").write_text(render_card(_facts(job, backbone, licence)))
        progress(3, _STEPS, "proving it with plain transformers")
        agreement = assembly.prove(folder, backbone)
        _open_to_readers(folder)
        write_file_digests(folder)
    progress(4, _STEPS, "recording")
    paths = [path for path in output_dir.rglob("*") if path.is_file()]
    report = Report(
        stage=STAGE,
        artifact=output_dir,
        rows=len(paths),
        rows_in=len(paths),
        kept=len(paths),
        seconds=time.monotonic() - started,
        bytes=sum(path.stat().st_size for path in paths),
        unit="files",
        details={
            "golden": agreement,
            "backbone": backbone.describe(),
            "include_backbone": settings.include_backbone,
            "parameters": job.head.projector.parameter_count,
            "embedding_dim": job.head.config.output_dim,
            "license": licence.identifier if licence.name is None else licence.name,
            "evaluated": bool(job.evaluation.headline),
            "notes": [] if job.evaluation.headline else [_NO_METRICS],
        },
    )
    provenance = Provenance(
        stage=STAGE,
        code_version=CODE_VERSION,
        config_digest=job.settings.digest,
        config=job.config,
        inputs=job.inputs,
        model=backbone.describe(),
        preprocessing=backbone.preprocessing.id,
    )
    record_artifact(output_dir, job.key, provenance, report)
    progress(_STEPS, _STEPS, "published")
    return report


def _proven(folder: Path) -> set[str]:
    """Names of the files that the folder's own manifest lists."""
    try:
        return {MANIFEST, *read_file_digests(folder)}
    except (InputError, ArtifactError):  # no manifest, or one of another program
        return set()


def _open_to_readers(folder: Path) -> None:
    """safetensors writes files that only their owner may read; give all files the permissions of an ordinary one."""
    mode = (folder / "README.md").stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _demand_fit(head: Checkpoint, backbone: Backbone) -> None:
    if head.config.input_dim != backbone.dim:
        raise ModelError(
            f"the head takes {head.config.input_dim} features, but backbone {backbone.model_id} gives {backbone.dim}; "
            "it was trained on another one"
        )
    recorded = head.backbone.preprocessing
    if recorded and recorded != backbone.preprocessing.id:
        raise ModelError(
            f"the head was trained on pixels prepared as '{recorded}', but backbone {backbone.model_id} asks for "
            f"'{backbone.preprocessing.id}'"
        )


def _facts(job: _Job, backbone: Backbone, licence: Licence) -> CardFacts:
    head = job.head
    origin: Mapping[str, str] = {} if head.provenance is None else head.provenance.inputs
    seeded = backbone.model_id.startswith(PREFIX)
    repo_id = job.settings.publishing.repo_id
    return CardFacts(
        name="spatial-embeddings" if repo_id is None else repo_id.rpartition("/")[2],
        repo_id=repo_id,
        backbone=backbone.model_id,
        revision=backbone.revision,
        on_hub=not seeded and len(backbone.revision) == _COMMIT_LENGTH,
        seeded=seeded,
        include_backbone=job.settings.publishing.include_backbone,
        pooling_type=backbone.pooling_type,
        preprocessing=backbone.preprocessing.describe(),
        input_dim=head.config.input_dim,
        hidden_widths=head.config.hidden_widths,
        output_dim=head.config.output_dim,
        parameters=head.projector.parameter_count,
        epoch=head.epoch,
        checkpoint_sha256=head.weights_sha256,
        config_digest=head.config_digest,
        inputs=origin,
        validation=head.metrics,
        licence=licence,
        evaluation=job.evaluation,
    )
