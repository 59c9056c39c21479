"""Golden vectors: a few seeded pictures and the vectors they must give, shipped with a model and checked on load.

A checksum notices changed weights; golden vectors also notice a changed library, decoder or device that computes
something else with the same weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import simplejpeg
import torch
from torch import Tensor

from spatial_core.backbones.preprocessing import Preprocessing
from spatial_core.errors import ArtifactError, ModelError
from spatial_core.images.decode import Pixels, decode_jpeg

FOLDER = "golden"
RECORD = "golden.json"
TENSORS = "golden.safetensors"
SIDE_PX = 320
_TENSOR_NAMES = frozenset({"pixel_values", "features", "embeddings"})


@dataclass(frozen=True)
class Tolerance:
    """How far a recomputed vector may lie from the shipped one.

    Args:
        min_cosine: cosine of the two vectors, at least.
        max_abs_difference: any component, at most; None where only the direction is checked.
    """

    min_cosine: float
    max_abs_difference: float | None = None


# Another CPU, library or thread count moves fp32 vectors by about 1e-6; the same machine by nothing.
AT_PUBLISHING = Tolerance(min_cosine=0.9999, max_abs_difference=1e-5)
FLOAT32 = Tolerance(min_cosine=0.9999, max_abs_difference=1e-4)
# bf16 keeps 8 bits: single components move by up to 0.01, directions hardly.
REDUCED_PRECISION = Tolerance(min_cosine=0.999)


@dataclass(frozen=True)
class Golden:
    """Shipped pictures, as tensors.

    Args:
        pixel_values: (N, 3, H, W) float32, preprocessed.
        features: (N, D) float32, pooled backbone features.
        embeddings: (N, E) float32, unit length.
    """

    pixel_values: Tensor
    features: Tensor
    embeddings: Tensor


@dataclass(frozen=True)
class Agreement:
    """How well vectors were reproduced."""

    min_cosine: float
    max_abs_difference: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> Agreement:
        """Compare (N, E) unit vectors row by row."""
        if found.shape != expected.shape:
            raise ModelError(f"golden vectors are {tuple(expected.shape)}, the model gives {tuple(found.shape)}")
        found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
        return cls(
            min_cosine=float(torch.nn.functional.cosine_similarity(found, expected).min()),
            max_abs_difference=float((found - expected).abs().max()),
        )

    def within(self, tolerance: Tolerance) -> bool:
        """False for NaN as well."""
        limit = tolerance.max_abs_difference
        return self.min_cosine >= tolerance.min_cosine and (limit is None or self.max_abs_difference <= limit)


def draw_facade(seed: int, index: int) -> Pixels:
    """(SIDE_PX, SIDE_PX, 3) uint8: a wall with rows of windows under a sky, different for every index."""
    random = np.random.default_rng([seed, index])
    side = SIDE_PX
    ramp = np.linspace(1.0, 0.75, side)[:, None, None]
    sky, wall, glass = (random.integers(low, high, 3) for low, high in ((150, 240), (70, 220), (20, 110)))
    image = np.broadcast_to(sky * ramp, (side, side, 3)).copy()
    roof, left, right = (int(random.integers(*span)) for span in ((20, 90), (5, 60), (side - 60, side - 5)))
    image[roof:, left:right] = wall * ramp[roof:]
    floors, bays = int(random.integers(2, 6)), int(random.integers(3, 8))
    height, width = (side - roof) // floors, (right - left) // bays
    for floor in range(floors):
        for bay in range(bays):
            top, start = roof + floor * height + height // 4, left + bay * width + width // 4
            image[top : top + height // 2, start : start + width // 2] = glass + random.integers(0, 60)
    image += random.normal(0, 2, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_images(folder: Path, seed: int, count: int) -> list[str]:
    """Write `count` JPEGs under `folder`/golden; returns their names relative to `folder`, in order."""
    (folder / FOLDER).mkdir()
    names = [f"{FOLDER}/{index:02d}.jpg" for index in range(count)]
    for index, name in enumerate(names):
        pixels = np.ascontiguousarray(draw_facade(seed, index))
        (folder / name).write_bytes(simplejpeg.encode_jpeg(pixels, quality=92, colorspace="RGB"))
    return names


def read_pixels(folder: Path, names: list[str], preprocessing: Preprocessing) -> Tensor:
    """Decode and preprocess the shipped JPEGs: (N, 3, H, W) float32."""
    batch = np.stack([preprocessing.pixels(decode_jpeg((folder / name).read_bytes())) for name in names])
    return preprocessing.normalise(torch.from_numpy(batch)).contiguous()


def save(folder: Path, names: list[str], golden: Golden) -> None:
    """Write the tensors and the record that says what is compared and how closely."""
    safetensors.torch.save_file(asdict(golden), folder / TENSORS)
    record = {
        "images": names,
        "tensors": TENSORS,
        "compare": "embeddings computed from pixel_values with the shipped embeddings, row by row",
        "tolerance": {
            "float32": asdict(FLOAT32),
            "reduced_precision": {"min_cosine": REDUCED_PRECISION.min_cosine},
        },
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> tuple[list[str], Golden]:
    """Read what `save` wrote: image names and tensors.

    Raises:
        ArtifactError: if a file is missing or not as `save` writes it.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
        tensors = safetensors.torch.load_file(folder / TENSORS)
        names = [str(name) for name in record["images"]]
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ArtifactError(f"{folder}: unreadable golden vectors ({error}); publish the model again") from error
    if set(tensors) != _TENSOR_NAMES:
        raise ArtifactError(f"{folder / TENSORS}: holds {sorted(tensors)}, expected {sorted(_TENSOR_NAMES)}")
    return names, Golden(**tensors)


def demand(found: Tensor, golden: Golden, tolerance: Tolerance, where: str) -> Agreement:
    """Check recomputed embeddings against the shipped ones.

    Raises:
        ModelError: if they differ by more than `tolerance`.
    """
    agreement = Agreement.between(found, golden.embeddings)
    if not agreement.within(tolerance):
        raise ModelError(
            f"{where}: golden vectors are not reproduced (cosine {agreement.min_cosine:.6f}, largest difference "
            f"{agreement.max_abs_difference:.2e}; allowed {tolerance.min_cosine}, {tolerance.max_abs_difference})"
        )
    return agreement
