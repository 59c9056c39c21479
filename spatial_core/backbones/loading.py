"""Loads a backbone: one path for hub models, local folders and the built-in seeded ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from spatial_core.backbones.family import Family, family_of, width, without_progress_bars
from spatial_core.backbones.model_source import ModelSource, find_model
from spatial_core.backbones.preprocessing import Preprocessing, load_preprocessing
from spatial_core.errors import ModelError

_log = logging.getLogger(__name__)

Precision = Literal["fp32", "tf32", "bf16"]
_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Backbone:
    """A loaded model and everything that decides what its features are.

    Args:
        model: the transformers model, in evaluation mode, on `device`.
        preprocessing: how its pixels are prepared.
        model_id: hub id, `seeded:<name>` or folder name.
        revision: hub commit, or digest of the folder's files.
        family: what kind of model it is.
        dim: feature width D.
        pooling_type: `cls_token` or `pooler_output`.
        precision: arithmetic of the forward pass.
        device: where it runs.
        folder: where its files are.
        run: the callable that is run: `model`, or its compiled form.
    """

    model: Any
    preprocessing: Preprocessing
    model_id: str
    revision: str
    family: Family
    dim: int
    pooling_type: str
    precision: str
    device: torch.device
    folder: Path
    run: Callable[..., Any]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) normalised float32 -> (B, D) float32, both on `device`; not normalised.

        For precision `tf32`, call it inside `matrix_products`.
        """
        outputs = self.run(pixel_values=pixels.to(_DTYPES[self.precision]))
        return self.family.pool(outputs, self.pooling_type).float()

    def describe(self) -> dict[str, str]:
        """Identity for provenance records."""
        return {
            "id": self.model_id,
            "revision": self.revision,
            "family": self.family.name,
            "pooling_type": self.pooling_type,
            "precision": self.precision,
            "dim": str(self.dim),
        }


def choose_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one.

    Raises:
        ModelError: if the device does not exist here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"infrastructure.device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"infrastructure.device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def matrix_products(precision: str, device: torch.device) -> Iterator[None]:
    """Let torch round the factors of fp32 matrix products while the block runs, if `precision` is `tf32`.

    The switch is the process's. On GPUs it means TF32 (10 bits of mantissa, several times the rate); on CPUs bf16
    factors where the processor multiplies them in hardware, and elsewhere just another fp32 kernel. `fp32` leaves the
    process as it is, which unless someone changed it means exact products.
    """
    before = torch.get_float32_matmul_precision()
    try:
        if precision == "tf32":
            torch.set_float32_matmul_precision("high" if device.type == "cuda" else "medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_backbone(
    model_name: str,
    revision: str | None = None,
    *,
    cache_dir: Path,
    base_dir: Path | None = None,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    pooling_type: str = "cls_token",
    trust_remote_code: bool = False,
    compile_model: bool = False,
) -> Backbone:
    """Find, fetch if need be, and load a backbone; see `find_model` for names and revisions.

    Raises:
        ConfigError, ModelError: as `find_model`; ModelError also for a model that is damaged, incomplete, unknown, or
            whose preprocessing is not supported.
    """
    source = find_model(
        model_name, revision, cache_dir=cache_dir, base_dir=base_dir, trust_remote_code=trust_remote_code
    )
    return load_source(
        source,
        device=device,
        precision=precision,
        pooling_type=pooling_type,
        trust_remote_code=trust_remote_code,
        compile_model=compile_model,
    )


def load_source(
    source: ModelSource,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = "fp32",
    pooling_type: str = "cls_token",
    trust_remote_code: bool = False,
    compile_model: bool = False,
) -> Backbone:
    """Load what `find_model` found. Raises as `load_backbone`."""
    device = torch.device(device)
    preprocessing = load_preprocessing(source.folder)
    model, family = _load_model(source, device, _DTYPES[precision], trust_remote_code)
    run: Callable[..., Any] = model
    if compile_model and device.type == "cuda":
        run = torch.compile(model)
    elif compile_model:
        _log.warning("embedding_model.compile has no effect on %s", device)
    return Backbone(
        model=model,
        preprocessing=preprocessing,
        model_id=source.model_id,
        revision=source.revision,
        family=family,
        dim=width(model.config),
        pooling_type=pooling_type,
        precision=precision,
        device=device,
        folder=source.folder,
        run=run,
    )


def _load_model(
    source: ModelSource, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[Any, Family]:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    folder = str(source.folder)
    # transformers takes the fused kernel where a model has one. On CPUs in bf16, explicit attention is 1.2 times as
    # fast for 257 tokens.
    attention = {"attn_implementation": "eager"} if device.type == "cpu" and dtype == torch.bfloat16 else {}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
        family = family_of(config.model_type, folder)
        with without_progress_bars():
            model, loaded = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                **attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{source.model_id}@{source.revision}: cannot be loaded from {folder} ({cause[0]})") from error
    missing = sorted(loaded["missing_keys"])
    if missing:
        # transformers fills these with random numbers and goes on.
        raise ModelError(
            f"{source.model_id}@{source.revision}: {len(missing)} weights are missing from {folder}, first {missing[0]}"
        )
    try:
        return model.eval().requires_grad_(False).to(device), family
    except torch.OutOfMemoryError as error:
        raise ModelError(f"{source.model_id}: its weights do not fit in the memory of {device}") from error
