"""The files of a model folder: configuration, weights, shipped code, pixels, golden vectors."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from spatial_core.backbones.loading import Backbone
from spatial_core.backbones.preprocessing import Preprocessing, parse_preprocessing
from spatial_core.errors import ModelError
from spatial_core.metric_learning.projector import Projector
from spatial_core.publishing import golden
from spatial_core.publishing.configuration_spatial_embeddings import SpatialEmbeddingsConfig
from spatial_core.publishing.modeling_spatial_embeddings import SpatialEmbeddingsModel
from spatial_core.publishing.transformers_session import plainly_loaded, quietly

PREPROCESSOR = "preprocessor_config.json"
_PROCESSOR_MODULE = "image_processing_spatial_embeddings"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
# One weights file whatever its size: digests, checks and people look for model.safetensors.
_MAX_SHARD_SIZE = "200GB"
# One grey level is what decoders and resamplers of different builds may disagree by.
_GREY_LEVELS = 1.01


def write_model(folder: Path, projector: Projector, backbone: Backbone, *, include_backbone: bool) -> None:
    """Write config.json, model.safetensors and the Python files.

    Raises:
        ModelError: if the backbone's architecture comes with code of its own, which a nested configuration cannot name.
    """
    remote = type(backbone.model).__module__.startswith("transformers_modules.")
    if remote and include_backbone:
        raise ModelError(
            f"backbone {backbone.model_id}: its architecture is not part of transformers, so it cannot be built inside "
            "another model; set publishing.include_backbone = false"
        )
    nested = None if remote else copy.deepcopy(backbone.model.config)
    if nested is not None:
        nested.name_or_path = ""  # it may be a path of this machine
    head = projector.config
    config = SpatialEmbeddingsConfig(
        backbone_config=nested,
        backbone_model_name=backbone.model_id,
        backbone_revision=backbone.revision,
        include_backbone=False,
        pooling_type=backbone.pooling_type,
        input_dim=head.input_dim,
        hidden_widths=head.hidden_widths,
        output_dim=head.output_dim,
        activation=head.activation,
        dropout=head.dropout,
        use_residual=head.use_residual,
        use_layer_norm=head.use_layer_norm,
    )
    model = SpatialEmbeddingsModel(config).eval()
    model.projector.load_state_dict(projector.state_dict())
    if include_backbone:
        # Taken as it is: a second copy of the largest backbone would need 27 GB more.
        model.backbone = backbone.model
        config.include_backbone = True
    with quietly():
        model.save_pretrained(folder, max_shard_size=_MAX_SHARD_SIZE)


def write_preprocessor(folder: Path, preprocessing: Preprocessing, processor_type: str) -> None:
    """Write `preprocessor_config.json` with every option spelled out.

    It names the backbone's own processor class, for whoever does not run shipped code, and the shipped one.

    Raises:
        ModelError: if the file would not mean the same preprocessing.
    """
    size = preprocessing.resize_to
    record: dict[str, Any] = {
        # Without the suffix: with it transformers 4.57 insists on torchvision before it looks at the shipped class.
        "image_processor_type": processor_type.removesuffix("Fast").removesuffix("Pil"),
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": preprocessing.shortest_edge} if size is None else _sides(size),
        "resample": _RESAMPLE[preprocessing.interpolation],
        "do_center_crop": preprocessing.crop is not None,
        "crop_size": None if preprocessing.crop is None else _sides(preprocessing.crop),
        "do_rescale": True,
        "rescale_factor": preprocessing.scale,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    if parse_preprocessing(record, PREPROCESSOR).id != preprocessing.id:
        raise ModelError(f"{PREPROCESSOR}: cannot express {preprocessing.describe()}")
    record["auto_map"] = {"AutoImageProcessor": f"{_PROCESSOR_MODULE}.SpatialEmbeddingsImageProcessor"}
    (folder / PREPROCESSOR).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    code = files("spatial_core.publishing").joinpath(f"{_PROCESSOR_MODULE}.py").read_text()
    (folder / f"{_PROCESSOR_MODULE}.py").write_text(code)


def read_preprocessor(folder: Path) -> Preprocessing:
    """Preprocessing of a published folder.

    Raises:
        ModelError: if the file is missing or asks for something unknown.
    """
    try:
        record = json.loads((folder / PREPROCESSOR).read_text())
        record.pop("auto_map", None)
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / PREPROCESSOR}: not readable ({error})") from error
    return parse_preprocessing(record, str(folder / PREPROCESSOR))


def processor_type(folder: Path) -> str:
    """Class name in a backbone folder's `preprocessor_config.json`, or the image part of `processor_config.json`."""
    path, nested = folder / PREPROCESSOR, folder / "processor_config.json"
    record = json.loads(path.read_text()) if path.is_file() else json.loads(nested.read_text())["image_processor"]
    return str(record.get("image_processor_type") or record["feature_extractor_type"])


@torch.inference_mode()
def make_golden(folder: Path, projector: Projector, backbone: Backbone, *, seed: int, count: int) -> None:
    """Draw the golden pictures and compute their vectors the way the training features were computed."""
    names = golden.write_images(folder, seed, count)
    pixels = golden.read_pixels(folder, names, backbone.preprocessing)
    features = backbone.features(pixels)
    golden.save(folder, names, golden.Golden(pixels, features.contiguous(), projector(features).contiguous()))


@torch.inference_mode()
def prove(folder: Path, backbone: Backbone) -> dict[str, float]:
    """Load the folder with plain transformers and compare with its golden vectors.

    Returns:
        `min_cosine` and `max_abs_difference` of the vectors, and `max_grey_levels` between the shipped processor's
        pixels and those the golden vectors were computed from.

    Raises:
        ModelError: if a vector differs by more than 1e-5 anywhere, or a pixel by more than a grey level.
    """
    names, expected = golden.load(folder)
    with plainly_loaded(folder) as (model, processor):
        if model.backbone is None:
            golden.demand(model(features=expected.features).embeddings, expected, golden.AT_PUBLISHING, "features")
            model.attach_backbone(backbone.model)
        found: Tensor = model(pixel_values=expected.pixel_values).embeddings
        images = []
        for name in names:
            with Image.open(folder / name) as image:
                images.append(image.convert("RGB"))
        pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
    agreement = golden.demand(found, expected, golden.AT_PUBLISHING, "plain transformers")
    levels = grey_levels(pixels, expected.pixel_values, backbone.preprocessing)
    if not levels <= _GREY_LEVELS:
        raise ModelError(f"the shipped image processor differs from training by {levels:.2f} grey levels")
    return {
        "min_cosine": agreement.min_cosine,
        "max_abs_difference": agreement.max_abs_difference,
        "max_grey_levels": levels,
    }


def grey_levels(found: Tensor, expected: Tensor, preprocessing: Preprocessing) -> float:
    """Largest difference of two (N, 3, H, W) batches of normalised pixels, in grey levels.

    Raises:
        ModelError: if they are of different shapes.
    """
    if found.shape != expected.shape:
        raise ModelError(f"pixels are {tuple(found.shape)}, expected {tuple(expected.shape)}")
    std = torch.tensor(preprocessing.std).view(1, 3, 1, 1)
    return float(((found - expected).abs() * std / preprocessing.scale).max())


def _sides(size: tuple[int, int]) -> dict[str, int]:
    return {"height": size[0], "width": size[1]}
