"""The state of a run after an epoch, from which a killed run goes on as if nothing had happened.

One safetensors file, replaced as a whole: tensors (weights, optimizer, bandit, random states, best weights so far) and
one JSON record among its metadata, which also carries a digest of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from spatial_core.errors import ArtifactError, DigestMismatch
from spatial_core.storage.atomic import atomic_file

STATE = "training_state.safetensors"
_RECORD = "spatial.training"


def save_state(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write both, atomically. `record` must be JSON-serialisable."""
    # Cloned, because safetensors refuses tensors that share memory.
    plain = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    text = json.dumps({**record, "tensors_sha256": _digest(plain)}, sort_keys=True, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(plain, {_RECORD: text}))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, on the CPU, and record.

    Raises:
        ArtifactError: if it is not a training state.
        DigestMismatch: if it was damaged after it was written.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record: dict[str, Any] = json.loads((file.metadata() or {})[_RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: not a training state ({error}); delete it to train from the start") from error
    if record.pop("tensors_sha256", None) != _digest(tensors):
        raise DigestMismatch(f"{path}: damaged after it was written; delete it to train from the start")
    return tensors, record


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
