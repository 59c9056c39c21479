"""How fast matrix products run here, and how many a vision transformer needs: the limit of any forward pass."""

from __future__ import annotations

import time
from typing import Any

import torch


def transformer_flops(config: Any, side_px: int) -> float:
    """Floating-point operations of one image's forward pass: matrix products only, 2 per multiply-add.

    Args:
        config: transformers configuration of a DINOv2 or DINOv3 vision transformer.
        side_px: side of the square image.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    patches = (side_px // config.patch_size) ** 2
    tokens = 1 + getattr(config, "num_register_tokens", 0) + patches
    hidden = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    gated = getattr(config, "use_gated_mlp", False)
    linear = 4 * width**2 + (3 if gated else 2) * width * hidden
    attention = 2 * tokens * width
    return 2.0 * (layers * tokens * (linear + attention) + patches * 3 * config.patch_size**2 * width)


def matmul_flops(
    dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int] = (4096, 4096, 4096), seconds: float = 1.0
) -> float:
    """Best rate of (m, k) x (k, n) products found within about `seconds`, in operations a second."""
    m, k, n = shape
    left = torch.randn(m, k, device=device).to(dtype)
    right = torch.randn(k, n, device=device).to(dtype)
    best = float("inf")
    with torch.inference_mode():
        torch.mm(left, right)
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            start = _now(device)
            for _ in range(4):
                torch.mm(left, right)
            best = min(best, (_now(device) - start) / 4)
    return 2.0 * m * k * n / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
