"""Our resampler beside Pillow's."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from spatial_core.images.resize import Interpolation, resize_rgb

FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def differences(picture: np.ndarray, height: int, width: int, interpolation: Interpolation) -> np.ndarray:
    expected = np.asarray(Image.fromarray(picture).resize((width, height), FILTERS[interpolation]))
    return np.abs(resize_rgb(picture, height, width, interpolation).astype(int) - expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((640, 640), (16, 16)),
        ((641, 479), (16, 16)),
        ((640, 640), (256, 256)),
        ((333, 1000), (256, 768)),
        ((61, 97), (256, 407)),
        ((8, 9), (16, 16)),
        ((300, 200), (200, 300)),
        ((200, 300), (300, 200)),
        # Tall pictures, where Pillow takes the height first, and the last one where it does not.
        ((1001, 334), (767, 256)),
        ((669, 334), (512, 256)),
        ((668, 334), (512, 256)),
        ((900, 300), (16, 16)),
    ],
)
def test_noise_within_one_grey_level_of_pillow(
    old: tuple[int, int], new: tuple[int, int], interpolation: Interpolation
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    apart = differences(noise, *new, interpolation)
    # Both round between the passes, from weights of different precision; on noise that adds up to 2 now and then.
    assert apart.max() <= 2
    assert (apart > 1).mean() <= 1e-4


def test_a_picture_of_the_right_size_is_handed_back() -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    assert resize_rgb(picture, 16, 16) is picture


def test_every_source_pixel_counts_when_shrinking() -> None:
    picture = np.zeros((160, 160, 3), np.uint8)
    picture[::2] = 200
    resized = resize_rgb(picture, 10, 10)
    assert resized.min() >= 97
    assert resized.max() <= 103
