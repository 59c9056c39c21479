"""Training on centred features of unit scale, with heads that apply to raw features all the same.

Backbone features share a large common part: two images of different places had a cosine of 0.99 with a seeded DINOv2.
A head starts by seeing little but that part, and needs several times as many steps to see past it: to reach a loss of
0.03, about 300 steps on raw and 50 on centred features of two real tars. On the demo city, recall@1 of held-out
buildings rose from 0.29 to 0.41 under equal settings. As the head begins with linear maps of its input,
(x - mean) / scale can be absorbed into their weights exactly; only training knows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 64 << 20
_INPUT_MAPS = ("input_layer", "residual_proj")


@dataclass(frozen=True)
class Frame:
    """What is subtracted from features, and what they are then divided by.

    Args:
        mean: (D,) float64 on the CPU.
        scale: one number for all dimensions, so that none is blown up.
    """

    mean: Tensor
    scale: float

    @classmethod
    def raw(cls, dim: int) -> Frame:
        """Features as they are."""
        return cls(torch.zeros(dim, dtype=torch.float64), 1.0)

    @classmethod
    def of(cls, values: Tensor) -> Frame:
        """Mean of (N, D) features, and the root mean square of what is left (1 if nothing is)."""
        count, dim = values.shape
        mean = torch.zeros(dim, dtype=torch.float64)
        for block in _blocks(values):
            mean += block.double().sum(0).cpu()
        mean /= count
        squares = torch.zeros((), dtype=torch.float64)
        for block in _blocks(values):
            squares += (block.double() - mean.to(values.device)).square().sum().cpu()
        scale = float((squares / (count * dim)).sqrt())
        return cls(mean, scale or 1.0)

    def apply_(self, values: Tensor) -> None:
        """Standardise (N, D) features in place, block by block."""
        mean = self.mean.to(values.device)
        for block in _blocks(values):
            block.copy_((block.double() - mean) / self.scale)

    def absorb(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a head for standardised features -> weights of the same head for raw ones."""
        weights = dict(state_dict)
        for weight, bias, name in _input_maps(weights):
            absorbed = weight.double().cpu() / self.scale
            weights[f"{name}.weight"] = absorbed.float()
            weights[f"{name}.bias"] = (bias.double().cpu() - absorbed @ self.mean).float()
        return weights

    def release(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `absorb`, up to rounding."""
        weights = dict(state_dict)
        for weight, bias, name in _input_maps(weights):
            exact = weight.double().cpu()
            weights[f"{name}.weight"] = (exact * self.scale).float()
            weights[f"{name}.bias"] = (bias.double().cpu() + exact @ self.mean).float()
        return weights

    @property
    def is_raw(self) -> bool:
        return self.scale == 1 and not self.mean.any()


def _blocks(values: Tensor) -> Iterator[Tensor]:
    """Views of consecutive rows."""
    yield from torch.split(values, max(1, _BLOCK_BYTES // (8 * max(1, values.shape[1]))))


def _input_maps(weights: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor, str]]:
    return [
        (weights[f"{name}.weight"], weights[f"{name}.bias"], name)
        for name in _INPUT_MAPS
        if f"{name}.weight" in weights
    ]
