"""Loading a published model for inference, without trusting what has not been checked.

Every file is hashed against the folder's manifest, the weights are put into this package's own classes (code shipped in
a folder or repository is never executed here), and the golden vectors are recomputed from the shipped pictures before
the first real image is embedded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever HTTP library it uses
from safetensors import SafetensorError
from torch import Tensor

from spatial_core.backbones.loading import Backbone, choose_device
from spatial_core.backbones.preprocessing import Preprocessing
from spatial_core.config.settings import Settings
from spatial_core.errors import InputError, ModelError
from spatial_core.publishing import golden
from spatial_core.publishing.assembly import grey_levels, read_preprocessor
from spatial_core.publishing.backbone_source import find_backbone, load_found
from spatial_core.publishing.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from spatial_core.publishing.integrity import MANIFEST, folder_digest, verify_files
from spatial_core.publishing.modeling_spatial_embeddings import SpatialEmbeddingsModel
from spatial_core.publishing.transformers_session import quietly

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Another build of the JPEG decoder or resampler may round a pixel the other way; more is another picture.
_GREY_LEVELS = 1.01


@dataclass(frozen=True)
class PublishedModel:
    """A checked model on its device.

    Args:
        sha256: `folder_digest`, which identifies every byte of the model.
        model: in evaluation mode.
        preprocessing: how pixels are prepared.
        device: where it computes.
        identity: what artifacts record about it.
    """

    sha256: str
    model: SpatialEmbeddingsModel
    preprocessing: Preprocessing
    device: torch.device
    identity: Mapping[str, str]

    @property
    def embedding_dim(self) -> int:
        return int(self.model.config.output_dim)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) float32 -> (B, embedding_dim) float32, unit length."""
        embeddings: Tensor = self.model(pixel_values=pixel_values).embeddings
        return embeddings


def model_digest(source: str) -> str:
    """Digest that identifies the model at `source` without reading its weights.

    Args:
        source: folder written by `publish_model`, or `owner/name@commit` on a hub.

    Raises:
        InputError: if there is no such folder, or it was not published by this project.
        ModelError: for a hub id without a commit, or one that cannot be fetched.
    """
    return folder_digest(Path(source) if Path(source).is_dir() else _from_hub(source, MANIFEST).parent)


def load_published(source: str, settings: Settings) -> PublishedModel:
    """Load, check, and put on the device of the settings.

    Args:
        source: folder written by `publish_model`, or `owner/name@commit` on a hub.
        settings: `infrastructure.device` and `inference.precision` matter here; for a head published alone also
            `embedding_model.model_name`, when its backbone is a local folder.

    Raises:
        InputError: if there is no such folder, or it was not published by this project.
        DigestMismatch: if a file is not what was published.
        ModelError: for a hub id without a commit, weights that do not fit, or golden vectors that are not reproduced.
    """
    folder = Path(source) if Path(source).is_dir() else _from_hub(source)
    digest = verify_files(folder)
    preprocessing = read_preprocessor(folder)
    model = _build(folder)
    if model.backbone is None:
        _attach(model, _recorded_backbone(model, settings))
    device = choose_device(settings.infrastructure.device)
    model = model.to(device).eval().requires_grad_(False)
    if settings.inference.precision == "bf16":
        # Weights of the backbone only: the head is small and stays exact, and so do tables of angles.
        for weight in model.backbone.parameters():
            weight.data = weight.data.to(torch.bfloat16)
    config = model.config
    identity = {
        "sha256": digest,
        "backbone": str(config.backbone_model_name),
        "backbone_revision": str(config.backbone_revision),
        "pooling_type": config.pooling_type,
        "precision": settings.inference.precision,
    }
    published = PublishedModel(digest, model, preprocessing, device, identity)
    check_golden(folder, published)
    return published


@torch.inference_mode()
def check_golden(folder: Path, published: PublishedModel) -> golden.Agreement:
    """Decode the shipped pictures, embed them, and compare with the shipped vectors.

    Raises:
        ModelError: if pixels differ by more than a grey level, or vectors by more than the stated tolerance.
    """
    names, expected = golden.load(folder)
    pixels = golden.read_pixels(folder, names, published.preprocessing)
    levels = grey_levels(pixels, expected.pixel_values, published.preprocessing)
    if not levels <= _GREY_LEVELS:
        raise ModelError(
            f"{folder}: golden pictures are decoded or resized differently here, by {levels:.1f} grey levels"
        )
    exact = published.identity["precision"] == "fp32"
    found = published.embed(expected.pixel_values.to(published.device))
    return golden.demand(found, expected, golden.FLOAT32 if exact else golden.REDUCED_PRECISION, str(folder))


def _build(folder: Path) -> SpatialEmbeddingsModel:
    try:
        with quietly():
            config = SpatialEmbeddingsConfig.from_pretrained(folder, local_files_only=True)
            model, loaded = SpatialEmbeddingsModel.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"{folder}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    # transformers fills missing weights with random numbers and goes on.
    faults = {name: sorted(loaded[name]) for name in ("missing_keys", "unexpected_keys") if loaded[name]}
    if faults:
        raise ModelError(f"{folder}: weights do not fit the configuration: {faults}")
    built: SpatialEmbeddingsModel = model
    return built


def _recorded_backbone(model: SpatialEmbeddingsModel, settings: Settings) -> Backbone:
    name, revision = model.config.backbone_model_name, model.config.backbone_revision
    if not name or not revision:
        raise ModelError(f"the model is a head alone and names no backbone with a revision ({name}@{revision})")
    return load_found(find_backbone(name, revision, settings), model.config.pooling_type, settings)


def _attach(model: SpatialEmbeddingsModel, backbone: Backbone) -> None:
    try:
        model.attach_backbone(backbone.model)
    except ValueError as error:
        raise ModelError(f"backbone {backbone.model_id}@{backbone.revision}: {error}") from error


def _from_hub(source: str, name: str | None = None) -> Path:
    """Fetch a repository, or one file of it, at the commit that `source` names."""
    found = _HUB_ID.fullmatch(source)
    if found is None:
        raise InputError(f"{source}: no such model folder, and not a hub id (owner/name@commit)")
    repo, revision = found["repo"], found["revision"] or ""
    if not _COMMIT.fullmatch(revision):
        raise ModelError(
            f"{source}: no such folder, and as a hub id it is not pinned: name the commit, {repo}@<40 hex digits>, "
            "so that the vectors can be told from those of a later upload"
        )
    try:
        if name is None:
            return Path(snapshot_download(repo, revision=revision))
        return Path(hf_hub_download(repo, name, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be fetched from the hub ({' '.join(str(error).split())[:200]})") from error
