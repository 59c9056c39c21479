"""Triplets of row numbers, drawn on the training device a batch at a time without a Python loop over samples.

An epoch passes over every image of every building that has at least two, once each and in random order, as the
anchor. (The earlier pipeline drew a random building for each sample, so an epoch missed about a third of the anchors.)
The positive is another image of the anchor's building, the negative a random image of a random candidate building in
the band that `BandUCB` chose. An anchor without candidates gets a random image of a random other building.

What does not depend on rewards is drawn ahead for many batches at once, so that a batch costs some forty small tensor
operations whatever its size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from spatial_core.errors import InputError
from spatial_core.metric_learning.bandit import NO_BAND, BandUCB
from spatial_core.metric_learning.difficulty_table import Candidates, chord

_AHEAD = 65_536
# Draws of a random other building before the farthest of them is taken although all are too near.
_REDRAWS = 8


@dataclass(frozen=True)
class BuildingRows:
    """Rows of a split by building: building b's are `order[start[b] : start[b] + size[b]]`.

    Args:
        label: (N,) int64 building of each row, 0 to B - 1.
        place: (N,) int64 position of each row among its building's.
    """

    label: Tensor
    order: Tensor
    start: Tensor
    size: Tensor
    place: Tensor

    @classmethod
    def of(cls, label: Tensor, buildings: int) -> Self:
        """Group (N,) labels."""
        size = torch.bincount(label, minlength=buildings)
        start = size.cumsum(0) - size
        order = torch.argsort(label, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(label), device=label.device) - start[label[order]]
        return cls(label, order, start, size, place)

    @property
    def anchors(self) -> Tensor:
        """(A,) rows that have another image of their building."""
        return (self.size[self.label] > 1).nonzero().squeeze(1)

    def image(self, building: Tensor, uniform: Tensor) -> Tensor:
        """A row of each building, by a number in [0, 1)."""
        return self.order[self.start[building] + (uniform * self.size[building]).long()]

    def other_image(self, row: Tensor, uniform: Tensor) -> Tensor:
        """Another row of each row's building, which must have two at least, by a number in [0, 1)."""
        building, place = self.label[row], self.place[row]
        other = (uniform * (self.size[building] - 1)).long()
        return self.order[self.start[building] + other + (other >= place)]


@dataclass(frozen=True)
class Triplets:
    """Row numbers of a batch, each (B,) int64, and the band its negatives came from (`NO_BAND`: drawn at random)."""

    anchors: Tensor
    positives: Tensor
    negatives: Tensor
    bands: Tensor

    @property
    def rows(self) -> Tensor:
        """(3B,) rows in the order the loss expects."""
        return torch.cat([self.anchors, self.positives, self.negatives])

    def part(self, share: slice) -> Triplets:
        """Some of the batch."""
        return Triplets(self.anchors[share], self.positives[share], self.negatives[share], self.bands[share])


class TripletSampler:
    """Draws epochs of triplets.

    Args:
        rows: the split, grouped.
        candidates: neighbours by band; None draws every negative at random.
        bandit: chooses bands; it must be given the rewards of a batch before the next is drawn.
        generator: of every draw, on the device of `rows`.
        positions: (B, 3) unit vectors of the buildings' places on the globe, or None when unknown.
        min_chord: random negatives are redrawn while nearer than this (see `chord`); 0 = anything goes.
        anchors: (A,) rows an epoch passes over; default all that have another image of their building.

    Raises:
        InputError: if the split has fewer than two buildings, or none with two images.
    """

    def __init__(
        self,
        rows: BuildingRows,
        candidates: Candidates | None,
        bandit: BandUCB,
        generator: torch.Generator,
        *,
        positions: Tensor | None = None,
        min_chord: float = 0.0,
        anchors: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.anchors = rows.anchors if anchors is None else anchors
        if len(rows.size) < 2 or not len(self.anchors):
            raise InputError(
                f"triplets need two buildings, one of them with two images; there are {len(rows.size)} buildings and "
                f"{len(self.anchors)} images with another of their building"
            )
        self.bandit = bandit
        self.generator = generator
        self._candidates = candidates if candidates is not None and len(candidates.building) else None
        self._positions = positions if min_chord > 0 else None
        self._min_chord = min_chord
        self.near_random = torch.zeros((), dtype=torch.int64, device=rows.label.device)

    def epoch(self, batch_size: int) -> Iterator[Triplets]:
        """All anchors once, in random order; the last batch may be smaller."""
        self.bandit.begin_epoch()
        order = torch.randperm(len(self.anchors), generator=self.generator, device=self.anchors.device)
        ahead = batch_size * max(1, _AHEAD // batch_size)
        for anchors in torch.split(self.anchors[order], ahead):
            yield from self._batches(anchors, batch_size)

    def _batches(self, anchors: Tensor, batch_size: int) -> Iterator[Triplets]:
        uniform = self._uniform(3, len(anchors))
        positives = self.rows.other_image(anchors, uniform[0])
        if self._candidates is None:
            negatives = self._random(anchors, uniform[1])
            bands = torch.full_like(anchors, NO_BAND)
            for begin in range(0, len(anchors), batch_size):
                batch = slice(begin, begin + batch_size)
                yield Triplets(anchors[batch], positives[batch], negatives[batch], bands[batch])
            return
        available = self._candidates.available[anchors].long()
        first = self._candidates.start[anchors] * (available > 0)
        # A last column more, so that NO_BAND has ends too: both 0, which names the first entry, drawn but not used.
        offsets = F.pad(self._candidates.band_offsets[anchors].long(), (0, 1))
        ends = torch.arange(2, device=anchors.device)
        random = torch.zeros_like(anchors)
        without = (available == 0).nonzero().squeeze(1)
        if len(without):
            random[without] = self._random(anchors[without], uniform[1, without])
        for begin in range(0, len(anchors), batch_size):
            batch = slice(begin, begin + batch_size)
            bands = self.bandit.choose(available[batch])
            low, high = offsets[batch].gather(1, bands[:, None] + ends).unbind(1)
            entry = first[batch] + low + (uniform[1, batch] * (high - low)).long()
            drawn = self.rows.image(self._candidates.building[entry].long(), uniform[2, batch])
            negatives = torch.where(bands == NO_BAND, random[batch], drawn)
            yield Triplets(anchors[batch], positives[batch], negatives, bands)

    def _random(self, anchors: Tensor, uniform: Tensor) -> Tensor:
        """A random row of another building for each anchor; `near_random` counts those nearer than allowed."""
        own = self.rows.label[anchors][:, None]
        draws = 1 if self._positions is None else _REDRAWS
        other = (self._uniform(len(anchors), draws) * (len(self.rows.size) - 1)).long()
        other += other >= own
        if self._positions is None:
            return self.rows.image(other[:, 0], uniform)
        apart = chord(self._positions[own], self._positions[other])
        # The first draw that is far enough, else the farthest of all.
        far = apart >= self._min_chord
        choice = torch.where(far.any(1), far.int().argmax(1), apart.argmax(1))[:, None]
        self.near_random += (~far.any(1)).sum()
        return self.rows.image(other.gather(1, choice).squeeze(1), uniform)

    def _uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1); float64, because a product with a count up to 2**53 then stays below the count."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.anchors.device)
