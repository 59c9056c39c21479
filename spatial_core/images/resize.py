"""The one resampler: antialiased, on uint8, within one grey level of Pillow's.

torch's uint8 kernel takes 0.1 to 0.5 ms for a 640 x 640 picture where Pillow takes 2.5 ms, and it never starts threads
of its own, so it may be called from decoding threads.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from spatial_core.images.decode import Pixels

Interpolation = Literal["bilinear", "bicubic"]


def resize_rgb(pixels: Pixels, height: int, width: int, interpolation: Interpolation = "bilinear") -> Pixels:
    """Resize (H, W, 3) uint8 to (height, width, 3) uint8; the aspect ratio is the caller's business.

    When the picture shrinks, the filter widens with the factor, as in Pillow: every source pixel counts.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    # (H, W, 3) in memory is (1, 3, H, W) in channels_last order, which is what the fast kernel wants.
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = functional.interpolate(image, (height, width), mode=interpolation, antialias=True)
    result: Pixels = resized[0].permute(1, 2, 0).numpy()
    return result
