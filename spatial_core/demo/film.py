"""What the camera adds to a picture: blur, vignetting, white balance, tone curve and noise."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageFilter

from spatial_core.demo.view import View

_NOISE_SEED = 70_441
_SHIFT_PX = 97


@lru_cache(maxsize=2)
def _grain(size: int) -> npt.NDArray[np.int16]:
    """(size + 97, size + 97, 3) grey Gaussian noise of deviation 64; larger than a picture so that windows differ."""
    rng = np.random.default_rng([_NOISE_SEED, size])
    noise = (rng.standard_normal((size + _SHIFT_PX, size + _SHIFT_PX, 1)) * 64).round().astype(np.int16)
    return np.repeat(noise, 3, axis=2)


@lru_cache(maxsize=2)
def _vignette(size: int) -> Image.Image:
    axis = np.linspace(-1, 1, size) ** 2
    shade = 255 - (axis[:, None] + axis[None, :]) * 22
    return Image.merge("RGB", [Image.fromarray(shade.astype(np.uint8))] * 3)


def develop(picture: Image.Image, view: View) -> Image.Image:
    """The finished RGB picture."""
    light, size = view.light, view.size_px
    if light.blur_px > 0.35:
        picture = picture.filter(ImageFilter.BoxBlur(light.blur_px * size / 640))
    picture = ImageChops.multiply(picture, _vignette(size))
    curve = [
        min(255, round(255 * min(1.0, value / 255 * gain) ** light.gamma))
        for gain in light.gains
        for value in range(256)
    ]
    picture = picture.point(curve)
    x, y = (int(offset) for offset in view.random.integers(0, _SHIFT_PX, 2))
    pixels = _grain(size)[y : y + size, x : x + size] * np.int16(round(light.noise * 4))
    pixels >>= 8
    pixels += np.asarray(picture)
    return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
