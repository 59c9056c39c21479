"""Triplets: drawn on the device a batch at a time, beside one Python call a sample.

The reference is the earlier pipeline's sampler, written from its specification: a random building, two different
images of it, the anchor's neighbours grouped by band, one UCB choice and one random image a sample, with NumPy's
generator. It runs in the main process, where its bandit is up to date; the loader workers of the earlier pipeline kept
stale copies.

Rows: row numbers only, with batches of 256 and 1024, and the latter with the gathering of the features. Both samplers
run on one thread.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Prepared, Row, compare, main
from spatial_core.metric_learning.bandit import BANDS, BandUCB
from spatial_core.metric_learning.difficulty_table import Candidates
from spatial_core.metric_learning.mining import BuildingRows, TripletSampler

BUILDINGS = 4000
NEIGHBOURS = 150
DIM = 384


def city(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels (N,), neighbour buildings (N, K) and their bands (N, K), ascending; 2 to 7 images a building."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(BUILDINGS), generator.integers(2, 8, BUILDINGS))
    neighbours = (labels[:, None] + generator.integers(1, BUILDINGS, (len(labels), NEIGHBOURS))) % BUILDINGS
    # The shares of bands that the calibration of the difficulty table gives: 5, 5, 10, 20, 20, 25 and 15 %.
    bands = np.searchsorted([0.05, 0.1, 0.2, 0.4, 0.6, 0.85], generator.random((len(labels), NEIGHBOURS)))
    return labels, neighbours, np.sort(bands, axis=1)


def our_sampler(seed: int = 0) -> TripletSampler:
    """The sampler over flat arrays."""
    labels, neighbours, bands = city(seed)
    offsets = np.stack([(bands < band).sum(1) for band in range(BANDS + 1)], axis=1)
    candidates = Candidates(
        torch.arange(len(labels)) * NEIGHBOURS,
        torch.from_numpy(offsets.astype(np.int16)),
        torch.from_numpy(((np.diff(offsets, axis=1) > 0) << np.arange(BANDS)).sum(1).astype(np.uint8)),
        torch.from_numpy(neighbours.astype(np.int32).reshape(-1)),
    )
    rows = BuildingRows.of(torch.from_numpy(labels), BUILDINGS)
    return TripletSampler(rows, candidates, BandUCB(2.0, 1000), torch.Generator().manual_seed(seed))


class ReferenceSampler:
    """One sample a call, from Python lists of ids, with NumPy's generator; neighbours are grouped at every call."""

    def __init__(self, seed: int = 0) -> None:
        labels, neighbours, bands = city(seed)
        self.random = np.random.RandomState(seed)
        self.label = [f"0101_{label}" for label in labels.tolist()]
        self.images: dict[str, np.ndarray] = {}
        for row, name in enumerate(self.label):
            self.images[name] = np.append(self.images.get(name, np.empty(0, np.int64)), row)
        self.buildings = list(self.images)
        self.near = [[f"0101_{building}" for building in line] for line in neighbours.tolist()]
        self.bands: list[list[int]] = bands.tolist()
        self.counts = dict.fromkeys(range(BANDS), 0)
        self.means = dict.fromkeys(range(BANDS), 0.0)
        self.total = 0

    def sample(self) -> tuple[int, int, int, int]:
        """Anchor, positive, negative, band; -1 for a negative drawn at random."""
        own = self.buildings[self.random.randint(len(self.buildings))]
        anchor, positive = self.random.choice(self.images[own], 2, replace=False)
        grouped: dict[int, list[str]] = {}
        for building, band in zip(self.near[anchor], self.bands[anchor], strict=True):
            grouped.setdefault(band, []).append(building)
        chosen = self.band(list(grouped))
        present = [building for building in grouped[chosen] if building in self.images]
        while not present:
            other = self.buildings[self.random.randint(len(self.buildings))]
            present, chosen = [other] if other != own else [], -1
        negative = self.random.choice(self.images[self.random.choice(present)])
        return int(anchor), int(positive), int(negative), chosen

    def band(self, available: list[int]) -> int:
        """UCB, uniform for the first 1000 rewards."""
        if self.total < 1000:
            return int(self.random.choice(available))
        bonus = np.log(self.total)
        return max(
            available,
            key=lambda band: self.means[band] + 2 * np.sqrt(bonus / self.counts[band]) if self.counts[band] else np.inf,
        )

    def reward(self, band: int, reward: float) -> None:
        """Statistics of one sample."""
        if band >= 0:
            self.total += 1
            self.counts[band] += 1
            self.means[band] += (reward - self.means[band]) / self.counts[band]


def features(rows: int) -> torch.Tensor:
    """(rows, DIM) float32."""
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1))


def load_ours(gather: bool) -> tuple[TripletSampler, torch.Tensor | None]:
    """The sampler, and features when they are gathered too."""
    sampler = our_sampler()
    return sampler, features(len(sampler.rows.label)) if gather else None


def run_ours(prepared: tuple[TripletSampler, torch.Tensor | None], batch_size: int, samples: int) -> dict[str, Any]:
    """Draw epochs until enough samples were drawn, rewarding every batch."""
    torch.set_num_threads(1)
    sampler, values = prepared
    reward = torch.rand(batch_size, generator=torch.Generator().manual_seed(2))
    drawn = 0
    while drawn < samples:
        for batch in sampler.epoch(batch_size):
            if values is not None:
                values[batch.rows]
            sampler.bandit.update(batch.bands, reward[: len(batch.bands)])
            drawn += len(batch.bands)
            if drawn >= samples:
                break
    return {"drawn": drawn}


def load_reference(gather: bool) -> tuple[ReferenceSampler, torch.Tensor | None]:
    """The same for the reference."""
    sampler = ReferenceSampler()
    return sampler, features(len(sampler.label)) if gather else None


def run_reference(
    prepared: tuple[ReferenceSampler, torch.Tensor | None], batch_size: int, samples: int
) -> dict[str, Any]:
    """Draw sample by sample and collate batches."""
    torch.set_num_threads(1)
    sampler, values = prepared
    for _ in range(samples // batch_size):
        drawn = [sampler.sample() for _ in range(batch_size)]
        if values is None:
            torch.tensor(drawn)
        else:
            for column in range(3):
                torch.stack([values[sample[column]] for sample in drawn])
        for sample in drawn:
            sampler.reward(sample[3], 0.5)
    return {"drawn": samples // batch_size * batch_size}


def rows(scale: float = 1.0) -> list[Row]:
    """Lines of the table."""
    ours, reference = int(2_000_000 * scale), int(40_960 * scale)
    measured = []
    for name, batch_size, gather, target in (
        ("triplet sampling, batch 1024", 1024, False, 80),
        ("triplet sampling, batch 256", 256, False, 80),
        (f"triplet sampling and gather {DIM}-d", 1024, True, None),
    ):
        items = ours // 8 if gather else ours
        measured.append(
            compare(
                name,
                "triplets",
                Prepared(partial(load_ours, gather), partial(run_ours, batch_size=batch_size, samples=items)),
                Prepared(partial(load_reference, gather), partial(run_reference, batch_size=1024, samples=reference)),
                items=items,
                reference_items=reference // 1024 * 1024,
                target=target,
            )
        )
    return measured


if __name__ == "__main__":
    main(rows)
