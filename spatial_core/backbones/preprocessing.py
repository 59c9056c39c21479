"""Pixels as a backbone wants them, from the model's own `preprocessor_config.json`.

Same results as transformers' processors (within one grey level before normalisation), without their per-image cost and
without torchvision: resize and crop run on uint8 in decoding threads. Normalisation follows there too when the model
runs on the CPU, and on the whole batch on the GPU otherwise, so that a quarter of the bytes is copied to it.

What transformers 5.23 does, and so do we: resize, centre crop, rescale, normalise. DINOv3's processor rescales before
it resizes; since resizing is linear that only matters where the result leaves [0, 1], which bilinear never does, so
another filter is refused there rather than imitated.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spatial_core.errors import ModelError
from spatial_core.images.decode import MAX_PIXELS, ImageError, Pixels
from spatial_core.images.resize import Interpolation, resize_rgb

# Raised when the same picture and options would give other pixels.
PIXELS_VERSION = "1"
_RESAMPLE: dict[int, Interpolation] = {2: "bilinear", 3: "bicubic"}
_CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_COMMON = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
# What each processor class assumes for a key its file leaves out or sets to null.
PROCESSORS: dict[str, dict[str, Any]] = {
    "BitImageProcessor": {
        **_COMMON,
        **_CLIP,
        "size": {"shortest_edge": 224},
        "default_to_square": False,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "do_convert_rgb": True,
    },
    "DINOv3ViTImageProcessor": {
        **_COMMON,
        **_IMAGENET,
        "size": {"height": 224, "width": 224},
        "default_to_square": True,
        "resample": 2,
        "do_center_crop": False,
        "crop_size": None,
        "do_convert_rgb": True,
    },
}
_RESCALES_FIRST = frozenset({"DINOv3ViTImageProcessor"})
# Keys that name the class, or how transformers runs it, but never what comes out.
_NO_EFFECT = frozenset(
    {
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "_valid_processor_keys",
        "return_tensors",
        "data_format",
        "input_data_format",
        "device",
        "disable_grouping",
    }
)


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop, rescale, normalise.

    Args:
        shortest_edge: the shorter side after resizing, pixels, the longer one keeping the aspect ratio (rounded down);
            None when `resize_to` is given.
        resize_to: exact (height, width) after resizing, pixels.
        interpolation: resampling filter.
        crop: (height, width) cut from the centre after resizing; None for no crop.
        scale: factor from grey levels to the range of `mean`.
        mean: per channel, subtracted after scaling.
        std: per channel, divided by.
    """

    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    interpolation: Interpolation
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every image handed to the model."""
        size = self.crop or self.resize_to
        if size is None:
            raise ModelError("images resized by their shortest edge need a centre crop to have one size")
        return size

    @property
    def id(self) -> str:
        """Short digest and readable text; two equal ids mean equal pixels."""
        text = self.describe()
        return f"{hashlib.sha256(text.encode()).hexdigest()[:12]} {text}"

    def describe(self) -> str:
        """Every option in one line."""
        to = f"shortest edge {self.shortest_edge}" if self.resize_to is None else "{}x{}".format(*self.resize_to)
        crop = "" if self.crop is None else "; centre crop {}x{}".format(*self.crop)
        mean, std = (",".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return (
            f"pixels v{PIXELS_VERSION}: resize {to} {self.interpolation} antialiased{crop}; "
            f"scale {self.scale:.6g}; mean {mean}; std {std}"
        )

    def pixels(self, image: Pixels) -> Pixels:
        """Resize and crop one (H, W, 3) uint8 image to (*output_size, 3) uint8, a view whose memory is plane by plane.

        Raises:
            ImageError: `image_elongated` when keeping the aspect ratio would make a picture beyond the size limit.
        """
        height, width = self._resized(*image.shape[:2])
        if height * width > MAX_PIXELS:
            raise ImageError(
                "image_elongated",
                f"{image.shape[1]}x{image.shape[0]} pixels would become {width}x{height}; at most {MAX_PIXELS} in all",
            )
        resized = resize_rgb(image, height, width, self.interpolation)
        crop_height, crop_width = self.output_size
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return resized[top : top + crop_height, left : left + crop_width]

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """(B, H, W, 3) uint8 on any device -> (B, 3, H, W) float32 there, in the memory order of the input."""
        factor, offset = _affine_on(self, batch.device)
        return batch.permute(0, 3, 1, 2).to(torch.float32).mul_(factor).sub_(offset)

    def normalise_into(self, pixels: Pixels, out: npt.NDArray[np.float32]) -> None:
        """(H, W, 3) uint8 -> `out`, (3, H, W) float32: what `normalise` computes, for one image in one thread."""
        factor, offset = (each.reshape(3, 1, 1) for each in self.affine())
        np.multiply(pixels.transpose(2, 0, 1), factor, out=out, casting="unsafe")
        np.subtract(out, offset, out=out)

    def affine(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """factor, offset (3,) such that a normalised value is grey level * factor - offset."""
        mean, std = np.array(self.mean), np.array(self.std)
        return (self.scale / std).astype(np.float32), (mean / std).astype(np.float32)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_to is not None:
            return self.resize_to
        edge = self.shortest_edge or 0
        long = int(edge * max(height, width) / min(height, width))
        return (long, edge) if width <= height else (edge, long)


@functools.lru_cache(maxsize=8)
def _affine_on(preprocessing: Preprocessing, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept on the device: copying them there for every batch would wait for the pass before."""
    with torch.inference_mode(mode=False):
        factor, offset = (torch.from_numpy(each).reshape(1, 3, 1, 1).to(device) for each in preprocessing.affine())
    return factor, offset


def load_preprocessing(folder: Path) -> Preprocessing:
    """Read a model folder's `preprocessor_config.json` (or the image part of a `processor_config.json`).

    Raises:
        ModelError: when there is none, or it asks for something unknown; names file and key.
    """
    path = folder / "preprocessor_config.json"
    nested = folder / "processor_config.json"
    try:
        if path.is_file():
            record = json.loads(path.read_text())
        elif nested.is_file():
            path, record = nested, json.loads(nested.read_text()).get("image_processor", {})
        else:
            raise ModelError(f"{folder}: no preprocessor_config.json, so how its pixels are prepared is unknown")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable JSON ({error})") from error
    return parse_preprocessing(record, str(path))


def parse_preprocessing(record: Mapping[str, Any], where: str) -> Preprocessing:
    """Turn processor options into a `Preprocessing`.

    Raises:
        ModelError: naming the first key that is unknown or asks for what is not done here.
    """
    if not isinstance(record, Mapping):
        raise ModelError(f"{where}: expected a JSON object, found {type(record).__name__}")
    name = str(record.get("image_processor_type") or record.get("feature_extractor_type") or "")
    base = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if base not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        raise ModelError(f"{where}: image_processor_type {name or 'is missing'}; known here are {known}")
    defaults = PROCESSORS[base]
    given = {key: value for key, value in record.items() if value is not None and key not in _NO_EFFECT}
    # Options switched off are as good as absent, whatever they are.
    unknown = [key for key in given if key not in defaults and given[key] is not False]
    if unknown:
        raise ModelError(f"{where}: {unknown[0]} = {given[unknown[0]]!r} is not supported")
    options = {**defaults, **given}
    interpolation = _interpolation(options["resample"], where, bilinear_only=base in _RESCALES_FIRST)
    if not options["do_resize"]:
        raise ModelError(f"{where}: do_resize = false is not supported: a batch needs images of one size")
    edge, exact = _size(options["size"], bool(options["default_to_square"]), where)
    crop = _crop(options["crop_size"], where) if options["do_center_crop"] else None
    if crop is None and exact is None:
        raise ModelError(f"{where}: size gives only the shortest edge and do_center_crop is off: images differ in size")
    smallest = exact or (edge or 0, edge or 0)
    if crop is not None and (crop[0] > smallest[0] or crop[1] > smallest[1]):
        raise ModelError(f"{where}: crop_size {crop} exceeds the resized image {smallest}; padding is not supported")
    normalise = options["do_normalize"]
    return Preprocessing(
        shortest_edge=edge,
        resize_to=exact,
        interpolation=interpolation,
        crop=crop,
        scale=float(options["rescale_factor"]) if options["do_rescale"] else 1.0,
        mean=_channels(options["image_mean"], "image_mean", where) if normalise else (0.0, 0.0, 0.0),
        std=_channels(options["image_std"], "image_std", where) if normalise else (1.0, 1.0, 1.0),
    )


def _interpolation(resample: Any, where: str, *, bilinear_only: bool) -> Interpolation:
    found = _RESAMPLE.get(resample) if isinstance(resample, int) else None
    if found is None or (bilinear_only and found != "bilinear"):
        known = "2 (bilinear)" if bilinear_only else "2 (bilinear) and 3 (bicubic)"
        raise ModelError(f"{where}: resample = {resample!r} is not supported; known here: {known}")
    return found


def _size(size: Any, square: bool, where: str) -> tuple[int | None, tuple[int, int] | None]:
    if isinstance(size, int) and size > 0:
        return (None, (size, size)) if square else (size, None)
    if isinstance(size, Mapping):
        named = {key: value for key, value in size.items() if value is not None}
        if set(named) == {"shortest_edge"}:
            return int(named["shortest_edge"]), None
        if set(named) == {"height", "width"}:
            return None, (int(named["height"]), int(named["width"]))
    raise ModelError(f"{where}: size = {size!r} is not supported; known here: shortest_edge, or height and width")


def _crop(size: Any, where: str) -> tuple[int, int]:
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, Mapping) and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    raise ModelError(f"{where}: crop_size = {size!r} is not supported; known here: height and width")


def _channels(values: Any, key: str, where: str) -> tuple[float, float, float]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape == ():
        array = np.repeat(array, 3)
    if array.shape != (3,) or not np.isfinite(array).all() or (key == "image_std" and (array <= 0).any()):
        raise ModelError(f"{where}: {key} = {values!r}; expected three numbers, for R, G and B")
    red, green, blue = array.tolist()
    return red, green, blue
