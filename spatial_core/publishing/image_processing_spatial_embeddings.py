"""Pixels exactly as the model was trained on them, for `AutoImageProcessor`.

This file is shipped inside the model folder and runs without spatial_core: it may import nothing but numpy, torch and
transformers. It does what the backbone's own processor does (resize with antialiasing, centre crop, rescale,
normalise), within one grey level, without needing torchvision.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

_MODES = {2: "bilinear", 3: "bicubic"}


class SpatialEmbeddingsImageProcessor(BaseImageProcessor):  # type: ignore[misc]
    """Images -> `pixel_values` (B, 3, H, W) float32.

    Args:
        size: `shortest_edge` in pixels (aspect ratio kept), or `height` and `width`.
        crop_size: `height` and `width` cut from the centre; None for no crop.
        resample: 2 bilinear, 3 bicubic.
        rescale_factor: from grey levels to the range of `image_mean`.
        image_mean: per channel.
        image_std: per channel.
        kwargs: the remaining keys of `preprocessor_config.json`, kept for the backbone's own processor class.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the name and form transformers looks for

    def __init__(
        self,
        *,
        size: dict[str, int] | None = None,
        crop_size: dict[str, int] | None = None,
        resample: int = 3,
        rescale_factor: float = 1 / 255,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        self.crop_size = None if crop_size is None else dict(crop_size)
        self.resample = int(resample)
        self.rescale_factor = rescale_factor
        self.image_mean = list(image_mean or (0.485, 0.456, 0.406))
        self.image_std = list(image_std or (0.229, 0.224, 0.225))

    def __call__(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        return self.preprocess(images, return_tensors=return_tensors, **kwargs)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare one image or a list of them.

        Args:
            images: PIL images, or uint8 arrays or tensors of shape (H, W, 3), (3, H, W) or (H, W).
            return_tensors: `pt` or `np`.

        Raises:
            ValueError: for an image of another shape or type, or an option this processor does not have.
        """
        if kwargs:
            raise ValueError(f"options fixed by the model: {', '.join(sorted(kwargs))}")
        many = isinstance(images, list | tuple)
        batch = torch.stack([self._pixels(_rgb(image)) for image in (images if many else [images])])
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (self.image_mean, self.image_std))
        values = batch.to(torch.float32).mul_((self.rescale_factor / std).float()).sub_((mean / std).float())
        return BatchFeature({"pixel_values": values.permute(0, 3, 1, 2).contiguous()}, tensor_type=return_tensors)

    def _pixels(self, image: np.ndarray[Any, np.dtype[np.uint8]]) -> torch.Tensor:
        """(H, W, 3) -> (crop height, crop width, 3), both uint8."""
        height, width = image.shape[:2]
        if "shortest_edge" in self.size:
            edge = self.size["shortest_edge"]
            long = int(edge * max(height, width) / min(height, width))
            height, width = (long, edge) if width <= height else (edge, long)
        else:
            height, width = self.size["height"], self.size["width"]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        mode = _MODES[self.resample]
        # Pillow resamples the height of tall pictures first, which shows where bicubic overshoots; so does training.
        if image.shape[0] - height > 2 * max(0, image.shape[1] - width):
            pixels = functional.interpolate(pixels, (height, image.shape[1]), mode=mode, antialias=True)
        if pixels.shape[2:] != (height, width):
            pixels = functional.interpolate(pixels, (height, width), mode=mode, antialias=True)
        if self.crop_size is not None:
            crop_height, crop_width = self.crop_size["height"], self.crop_size["width"]
            top, left = (height - crop_height) // 2, (width - crop_width) // 2
            pixels = pixels[:, :, top : top + crop_height, left : left + crop_width]
        return pixels[0].permute(1, 2, 0)


def _rgb(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else np.array(image)
    if array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[-1] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype != np.uint8:
        raise ValueError(f"expected a PIL image or a uint8 RGB array, found {array.dtype} of shape {array.shape}")
    return np.ascontiguousarray(array)


SpatialEmbeddingsImageProcessor.register_for_auto_class("AutoImageProcessor")
