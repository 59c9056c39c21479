"""Queries to look at: as many right as wrong, drawn at random, with what the projector found for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spatial_core.evaluation.pairs import pair_cosines, positive_pairs
from spatial_core.evaluation.scores import Queries
from spatial_core.evaluation.spaces import PROJECTOR
from spatial_core.evaluation.split_data import SplitData

NEIGHBOURS = 5


@dataclass(frozen=True)
class Shown:
    """An image of the gallery: its row in the split, ids, cosine with the query, and whether it is a right answer."""

    row: int
    image: str
    building: str
    cosine: float
    right: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "building": self.building,
            "cosine": round(self.cosine, 4),
            "same_building": self.right,
        }


@dataclass(frozen=True)
class Example:
    """A query with its nearest images and its best right answer, which stands at rank `truth_rank`."""

    query: Shown
    neighbours: tuple[Shown, ...]
    truth: Shown
    truth_rank: int

    def to_json(self) -> dict[str, Any]:
        return {
            "query": self.query.image,
            "building": self.query.building,
            "neighbours": [neighbour.to_json() for neighbour in self.neighbours],
            "best_right_answer": {**self.truth.to_json(), "rank": self.truth_rank},
        }


@dataclass(frozen=True)
class Gallery:
    """Examples whose nearest image was of the same building, and examples where it was not."""

    split: str
    right: tuple[Example, ...] = ()
    wrong: tuple[Example, ...] = ()

    @property
    def rows(self) -> list[int]:
        """Every image row that is shown, once."""
        shown = [part for example in (*self.right, *self.wrong) for part in _parts(example)]
        return sorted({part.row for part in shown})

    def to_json(self) -> dict[str, Any]:
        return {
            "split": self.split,
            "right": [example.to_json() for example in self.right],
            "wrong": [example.to_json() for example in self.wrong],
        }


def choose_examples(split: SplitData, vectors: Tensor, queries: Queries, count: int, seed: int) -> Gallery:
    """Draw up to `count` right and `count` wrong queries of the projector, one a building, and find their neighbours.

    Args:
        split: the split the queries belong to.
        vectors: (N, D) unit rows of the projector's space.
        queries: outcome of the search.
        count: examples of each kind.
        seed: of the draw.
    """
    ranks = queries.outcomes[PROJECTOR].first_rank.numpy()
    order = np.random.default_rng(seed).permutation(len(ranks))
    chosen: dict[bool, list[int]] = {True: [], False: []}
    used: set[int] = set()
    for position in order.tolist():
        kind, building = bool(ranks[position] == 1), int(queries.buildings[position])
        if len(chosen[kind]) < count and building not in used:
            chosen[kind].append(position)
            used.add(building)
    # The most nearly right of the wrong ones come first, so that the page descends into worse and worse mistakes.
    chosen[False].sort(key=lambda position: int(ranks[position]))
    positions = [*chosen[True], *chosen[False]]
    if not positions:
        return Gallery(split.name)
    rows = queries.rows[positions]
    cosines = vectors[rows].float() @ vectors.float().T
    cosines[torch.arange(len(rows)), rows] = -torch.inf
    nearest = cosines.topk(min(NEIGHBOURS, len(vectors) - 1))
    owner, image = positive_pairs(split.labels, rows)
    found = pair_cosines(vectors, rows.numpy()[owner], image)
    examples = []
    for place, position in enumerate(positions):
        query = int(rows[place])
        best = int(found[owner == place].argmax())
        truth = _shown(split, int(image[owner == place][best]), float(found[owner == place][best]), query)
        neighbours = zip(nearest.indices[place].tolist(), nearest.values[place].tolist(), strict=True)
        examples.append(
            Example(
                query=_shown(split, query, 1.0, query),
                neighbours=tuple(_shown(split, row, cosine, query) for row, cosine in neighbours),
                truth=truth,
                truth_rank=int(ranks[position]),
            )
        )
    border = len(chosen[True])
    return Gallery(split.name, tuple(examples[:border]), tuple(examples[border:]))


def _shown(split: SplitData, row: int, cosine: float, query: int) -> Shown:
    label = int(split.labels[row])
    same = label == int(split.labels[query])
    return Shown(row, split.images[row].as_py(), split.buildings[label].as_py(), cosine, same)


def _parts(example: Example) -> tuple[Shown, ...]:
    return (example.query, *example.neighbours, example.truth)
