"""A trained projection head on disk: weights as safetensors, everything else as JSON beside them.

`checkpoint_best.safetensors` holds only weights and its provenance; `checkpoint_best.json` names them by SHA-256 and
holds the architecture, the epoch, its metrics, the history of the run, and which backbone the features came from. The
JSON carries a digest of itself, so damage to either file is noticed. Weights in the earlier pipeline's pickle format
load too, but nothing in a pickle is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from spatial_core.config.sections import TrainingModelSection
from spatial_core.errors import ArtifactError, DigestMismatch, InputError, ModelError
from spatial_core.metric_learning.projector import Projector, ProjectorConfig, build_projector, infer_config
from spatial_core.storage.atomic import atomic_file
from spatial_core.storage.digests import digest_json, sha256_file
from spatial_core.storage.provenance import FOOTER_KEY, Provenance

FORMAT = "spatial-projector/1"
BEST = "checkpoint_best.safetensors"
FINAL = "checkpoint_final.safetensors"
_RECORD_DIGEST = "record_sha256"


@dataclass(frozen=True)
class Backbone:
    """Where the features that a head was trained on came from, as the splits' footers recorded it.

    Args:
        model: id, revision, pooling and whatever else the embedding stage recorded; empty when unknown.
        preprocessing: id of the pixel preprocessing; empty when unknown.
    """

    model: Mapping[str, str] = field(default_factory=dict)
    preprocessing: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A head and what is known about it.

    Args:
        projector: in evaluation mode, fp32, on the CPU.
        epoch: epochs completed when the weights were taken.
        metrics: validation metrics at that epoch, by name (`recall@1`, `loss`, ...).
        history: one record an epoch, up to the time the checkpoint was written.
        backbone: origin of the features.
        provenance: producing stage, settings used, settings digest and input digests; None for an earlier pipeline's.
        weights_sha256: of the file the weights were read from; empty for a head that was not read from disk.
    """

    projector: Projector
    epoch: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    backbone: Backbone = field(default_factory=Backbone)
    provenance: Provenance | None = None
    weights_sha256: str = ""

    @property
    def config(self) -> ProjectorConfig:
        """The head's architecture."""
        return self.projector.config

    @property
    def config_digest(self) -> str:
        """`Settings.digest` of the run that trained it; empty for an earlier pipeline's checkpoint."""
        return "" if self.provenance is None else self.provenance.config_digest


def record_path(weights: Path) -> Path:
    """The JSON that belongs to a weights file."""
    return weights.with_suffix(".json")


def checkpoint_record(checkpoint: Checkpoint, weights_sha256: str) -> dict[str, Any]:
    """What the JSON beside the weights holds."""
    provenance = checkpoint.provenance
    record: dict[str, Any] = {
        "format": FORMAT,
        "weights_sha256": weights_sha256,
        "projector": checkpoint.config.to_json(),
        "parameters": checkpoint.projector.parameter_count,
        "epoch": checkpoint.epoch,
        "metrics": dict(checkpoint.metrics),
        "history": [dict(entry) for entry in checkpoint.history],
        "backbone": {"model": dict(checkpoint.backbone.model), "preprocessing": checkpoint.backbone.preprocessing},
        "config_digest": checkpoint.config_digest,
        "provenance": None if provenance is None else json.loads(provenance.to_json()),
    }
    return {**record, _RECORD_DIGEST: digest_json(record)}


def encode_weights(state_dict: Mapping[str, Tensor], provenance: Provenance | None) -> bytes:
    """The state dict as safetensors; equal weights and provenance give equal bytes."""
    # safetensors keeps metadata in a hash map: with a second entry the order, and so the bytes, would vary.
    metadata = None if provenance is None else {FOOTER_KEY.decode(): provenance.to_json()}
    tensors = {name: weight.detach().to("cpu", torch.float32).contiguous() for name, weight in state_dict.items()}
    return safetensors.torch.save(tensors, metadata)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> str:
    """Write `path` (.safetensors) and its JSON; returns the SHA-256 of the weights file.

    Both files are complete and flushed before either takes its name, and the JSON takes its first, so that weights
    never appear without it. Where a checkpoint is replaced, a process killed exactly between the two leaves weights
    that the JSON denies, which loading reports.
    """
    data = encode_weights(checkpoint.projector.state_dict(), checkpoint.provenance)
    digest = hashlib.sha256(data).hexdigest()
    text = json.dumps(checkpoint_record(checkpoint, digest), indent=2, sort_keys=True, allow_nan=False)
    with atomic_file(path) as weights, atomic_file(record_path(path)) as record:
        record.write_text(text + "\n")
        weights.write_bytes(data)
    return digest


def load_checkpoint(path: Path, head: TrainingModelSection | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: a `.safetensors` file of ours, a folder holding `checkpoint_best.safetensors`, or a `.pt` file of the
            earlier pipeline.
        head: gives the activation and dropout of an earlier pipeline's checkpoint, which does not record them.

    Raises:
        InputError: if a file is missing.
        DigestMismatch: if weights or JSON are not what was written.
        ArtifactError: if a file cannot be parsed.
        ModelError: if the weights are not those of a projection head, or a pickle holds anything but data.
    """
    if path.is_dir():
        path = path / BEST
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _load_ours(path)
    if path.suffix in {".pt", ".pth", ".ckpt"}:
        return _load_legacy(path, head)
    raise InputError(f"{path}: a checkpoint is a .safetensors file, or a .pt file of the earlier pipeline")


def read_record(weights: Path) -> dict[str, Any]:
    """The JSON beside a weights file, checked against its own digest.

    Raises:
        InputError: if it is missing.
        ArtifactError: if it is not JSON of this format.
        DigestMismatch: if it was changed after it was written.
    """
    path = record_path(weights)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: missing; it belongs to {weights.name} and must lie beside it") from None
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON ({error}); run stage 'train' again") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ArtifactError(f"{path}: not a checkpoint record of format {FORMAT}; run stage 'train' again")
    stated = record.pop(_RECORD_DIGEST, None)
    if stated != digest_json(record):
        raise DigestMismatch(f"{path}: its content changed after it was written; run stage 'train' again")
    return record


def _load_ours(path: Path) -> Checkpoint:
    record = read_record(path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != record["weights_sha256"]:
        raise DigestMismatch(
            f"{path}: damaged (recorded sha256 {record['weights_sha256'][:12]}, found {digest[:12]}); "
            f"run stage 'train' again"
        )
    try:
        state_dict = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise ArtifactError(f"{path}: not a safetensors file ({error})") from error
    provenance = record["provenance"]
    return Checkpoint(
        projector=_build(path, ProjectorConfig.from_json(record["projector"]), state_dict),
        epoch=record["epoch"],
        metrics=record["metrics"],
        history=tuple(record["history"]),
        backbone=Backbone(**record["backbone"]),
        provenance=None if provenance is None else Provenance(**provenance),
        weights_sha256=digest,
    )


def _load_legacy(path: Path, head: TrainingModelSection | None) -> Checkpoint:
    content = read_pickle(path)
    state_dict = content.get("model_state_dict")
    if not isinstance(state_dict, dict):
        raise ModelError(f"{path}: has no model_state_dict; it holds {', '.join(map(str, list(content)[:8]))}")
    head = TrainingModelSection() if head is None else head
    try:
        config = infer_config(state_dict, activation=head.activation, dropout=head.dropout)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    metrics = content.get("metrics")
    return Checkpoint(
        projector=_build(path, config, state_dict),
        epoch=int(content.get("epoch", -1)) + 1,  # the earlier pipeline counted epochs from 0
        metrics=_flat_numbers(metrics) if isinstance(metrics, dict) else {},
        weights_sha256=sha256_file(path),
    )


def read_pickle(path: Path) -> dict[str, Any]:
    """A torch pickle that holds only tensors, numbers, strings and containers of them.

    Raises:
        ModelError: if it holds anything else (code would run on loading it), or is not a torch file.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: refused, the pickle holds more than weights and numbers ({cause})") from error
    except Exception as error:  # damaged pickles fail in any way the bytes happen to spell
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ModelError(f"{path}: not a torch checkpoint ({cause})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds {type(content).__name__}, expected a dictionary with model_state_dict")
    return content


def _build(path: Path, config: ProjectorConfig, state_dict: Mapping[str, Tensor]) -> Projector:
    try:
        return build_projector(config, state_dict)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _flat_numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a legacy metrics dict, the nested validation metrics on the same level, infinities left out."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            flat.update(_flat_numbers(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            flat[str(name).removeprefix("retrieval_")] = float(value)
    return flat
