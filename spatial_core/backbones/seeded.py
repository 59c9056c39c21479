"""Small backbones with seeded random weights, for tests and the demonstration where no hub can be reached.

Each is written once as an ordinary model folder and then loaded by the loader that loads real weights. Random weights
as transformers initialises them say little about a picture (recall@1 on the two real tars 0.12 to 0.15). The same
architecture tells buildings apart when its random weights follow three habits of trained ones:

* patch filters are smooth, mixtures of the lowest cosine waves of three opponent colours instead of white noise;
* tokens carry a strong, smooth trace of where they lie, so that each head's CLS query pools one soft region;
* features are centred, as DINO's loss makes them, each of about unit variance. Without this 99 % of a feature vector's
  length is common to all pictures, and a projection head spends its training on getting rid of it: recall@1 on
  validation buildings of the demo city then peaks at 0.22 instead of 0.35, where the features themselves reach 0.20.

Measured (cosine, all images as queries): recall@1 0.22 to 0.33 and recall@5 0.40 to 0.50 on the 60 real photographs,
chance 0.025. Pictures of 168 or 176 pixels cost half of what 224 cost and did no worse.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from spatial_core.backbones.family import Demo, known_families, without_progress_bars
from spatial_core.errors import ModelError
from spatial_core.storage.digests import digest_json

PREFIX = "seeded:"
SEED = 20_260_101
# Part of the folder's name: raised when the same configuration would get other weights.
_RECIPE = "3"
_WAVES = 3  # cosine waves an axis in a patch filter
_PLACE_WAVES = 2  # cosine waves an axis in the trace of place
_COLOUR_GAIN = 4.0  # of the two opponent colours, relative to brightness
_PLACE_GAIN = 3.0  # of the trace of place, relative to content
_FOCUS = 4.0  # of queries and keys: how selective attention is
_MIXING = 0.5  # of the first layer of each MLP
_OWN = 0.3  # of the CLS token's own vector: what pictures add to it must not drown in bf16's rounding of it
_PICTURES = 32  # of coloured noise, to centre features on
_STEPS = 64  # values of the last normalisation are multiples of 1 / this


def seeded_names() -> list[str]:
    """Names accepted by `seeded_folder`, with their prefix."""
    return [PREFIX + name for family in known_families() for name in family.demos]


def seeded_folder(name: str, root: Path) -> Path:
    """The model folder of `seeded:<name>` under `root`, written on the first call; safe against concurrent calls.

    Raises:
        ModelError: if there is no such model.
    """
    demos = {PREFIX + key: demo for family in known_families() for key, demo in family.demos.items()}
    if name not in demos:
        raise ModelError(f"{name}: no such built-in model; there are {', '.join(demos)}")
    demo = demos[name]
    recipe = digest_json([_RECIPE, SEED, demo.model_type, dict(demo.config), dict(demo.preprocessor)])
    folder = root / f"{name.replace(':', '-')}-{recipe[:12]}"
    if not folder.is_dir():
        _write(demo, folder)
    return folder


def _write(demo: Demo, folder: Path) -> None:
    # The first of several writers wins: a folder is never replaced, so nobody sees it vanish while loading it.
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with without_progress_bars():
            build(demo).save_pretrained(temporary)
        (temporary / "preprocessor_config.json").write_text(json.dumps(demo.preprocessor, indent=2) + "\n")
        for file in temporary.iterdir():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build(demo: Demo, seed: int = SEED) -> Any:
    """The model with its seeded weights; torch's own random state is left as it was."""
    from transformers import AutoConfig, AutoModel

    with _seeded(seed):
        model = AutoModel.from_config(AutoConfig.for_model(demo.model_type, **demo.config))
        random = np.random.default_rng(seed)
        _shape(model.eval(), random)
        _centre(model, demo.config["image_size"], random)
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def _shape(model: Any, random: np.random.Generator) -> None:
    """Give freshly initialised weights the first two habits described above."""
    embeddings = model.embeddings
    patches = getattr(embeddings.patch_embeddings, "projection", embeddings.patch_embeddings)
    dim, _, side, _ = patches.weight.shape
    patches.weight.copy_(torch.from_numpy(_patch_filters(dim, side, random)))
    embeddings.cls_token.normal_(std=_OWN)
    place = getattr(embeddings, "position_embeddings", None)
    if place is None:
        # Rotary positions turn this shared vector by the patch's place, which serves the same end.
        patches.bias.normal_(std=_PLACE_GAIN)
    else:
        grid = round((place.shape[1] - 1) ** 0.5)
        place.zero_()
        place[0, 1:] = torch.from_numpy(_PLACE_GAIN * _places(grid, dim, random))
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            weight.mul_(_FOCUS)
        elif name.endswith(("fc1.weight", "up_proj.weight")):
            weight.mul_(_MIXING)


@torch.no_grad()
def _centre(model: Any, side: int, random: np.random.Generator) -> None:
    """Let the last normalisation give CLS features of zero mean and unit variance over pictures of coloured noise.

    Computed in double precision and rounded far more coarsely than its errors: every machine gets equal weights.
    """
    last = model.layernorm if hasattr(model, "layernorm") else model.norm
    pictures = torch.from_numpy(_noise_pictures(_PICTURES, side, random))
    features = model.double()(pictures).last_hidden_state[:, 0]
    model.float()
    mean, spread = features.mean(dim=0), features.std(dim=0)
    last.weight.copy_((_STEPS / spread).round() / _STEPS)
    last.bias.copy_((-_STEPS * mean / spread).round() / _STEPS)


def _noise_pictures(count: int, side: int, random: np.random.Generator) -> npt.NDArray[np.float64]:
    """(count, 3, side, side) normalised pixels: greyish noise with the 1/f spectrum of photographs, in many lights."""
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij"))
    frequency[0, 0] = np.inf
    planes = np.fft.ifft2(np.fft.fft2(random.standard_normal((count, 4, side, side))) / frequency).real
    planes /= planes.std(axis=(2, 3), keepdims=True)
    contrast, light = random.uniform(0.6, 1.2, (count, 1, 1, 1)), random.normal(0, 0.5, (count, 1, 1, 1))
    tint = random.normal(0, 0.15, (count, 3, 1, 1))
    pictures: npt.NDArray[np.float64] = contrast * (planes[:, :1] + 0.3 * planes[:, 1:]) + light + tint
    return pictures


def _cosines(count: int, length: int) -> npt.NDArray[np.float64]:
    """(count, length): orthonormal cosine waves, lowest frequency first."""
    frequency, place = np.arange(count)[:, None], np.arange(length)[None]
    waves: npt.NDArray[np.float64] = np.cos(np.pi * (place + 0.5) * frequency / length) * np.sqrt(2 / length)
    waves[0] /= np.sqrt(2)
    return waves


def _patch_filters(dim: int, side: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """(dim, 3, side, side): random mixtures of smooth colour waves, louder where natural pictures are fainter."""
    waves = _cosines(_WAVES, side)
    frequency = np.hypot(*np.meshgrid(np.arange(_WAVES), np.arange(_WAVES), indexing="ij"))
    opponents = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    opponents /= np.linalg.norm(opponents, axis=1, keepdims=True)
    opponents[1:] *= _COLOUR_GAIN
    # a, b: frequencies down and across; y, x: place in the patch; o: opponent colour; c: RGB
    basis = np.einsum("ab,ay,bx,oc->abocyx", np.sqrt(1 + frequency), waves, waves, opponents)
    basis = basis.reshape(-1, 3 * side * side)
    mixtures: npt.NDArray[np.float64] = random.standard_normal((dim, len(basis))) @ basis / np.sqrt(len(basis))
    return mixtures.reshape(dim, 3, side, side).astype(np.float32)


def _places(grid: int, dim: int, random: np.random.Generator) -> npt.NDArray[np.float32]:
    """(grid * grid, dim) of unit variance: random smooth functions of a patch's row and column."""
    waves = _cosines(_PLACE_WAVES + 1, grid)
    planes = np.einsum("ay,bx->yxab", waves, waves).reshape(grid * grid, -1)[:, 1:]
    planes /= planes.std(axis=0)
    traces: npt.NDArray[np.float64] = planes @ random.standard_normal((planes.shape[1], dim)) / np.sqrt(planes.shape[1])
    return traces.astype(np.float32)
