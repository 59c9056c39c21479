"""Validation of a head: triplet loss and retrieval on a fixed choice of images, the same at every epoch.

Both choices are seeded and made once, so that two epochs, or two runs, differ only by their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spatial_core.config.sections import TrainingSection
from spatial_core.errors import ConfigError
from spatial_core.metric_learning.bandit import BandUCB
from spatial_core.metric_learning.difficulty_table import chord_of, load_candidates
from spatial_core.metric_learning.features import Split
from spatial_core.metric_learning.losses import triplet_losses
from spatial_core.metric_learning.mining import BuildingRows, TripletSampler
from spatial_core.metric_learning.projector import Projector, project
from spatial_core.retrieval.metrics import retrieval_metrics, select_queries

_TRIPLETS = 1000


class Selection:
    """Which of two validations is better: `recall@k` (higher) or `loss` (lower) as `training.selection_metric` says.

    Equal recalls are told apart by the loss, for on a small split many epochs reach the same recall.

    Raises:
        ConfigError: if the metric is neither.
    """

    def __init__(self, metric: str) -> None:
        name, _, k = metric.partition("@")
        if not (metric == "loss" or (name == "recall" and k.isdecimal() and int(k) > 0)):
            raise ConfigError(f"training.selection_metric is {metric!r}; it must be loss or recall@k, as in recall@1")
        self.metric = metric
        self.k = int(k) if k else None

    def key(self, metrics: dict[str, float]) -> tuple[float, float]:
        """Orders validations: the greater the better."""
        if self.metric == "loss":
            return -metrics["loss"], 0.0
        return metrics[self.metric], -metrics["loss"]


class Validator:
    """Measures a head on one split.

    Args:
        split: images to validate on; they must be able to form triplets.
        difficulty: table that gives the triplets their negatives, drawn uniformly over bands.
        settings: margin, distance, queries and k.
        min_distance_m: negatives nearer than this on the ground are avoided.
        seed: of the choice of triplets and queries.
    """

    def __init__(
        self, split: Split, difficulty: Path, settings: TrainingSection, *, min_distance_m: float, seed: int
    ) -> None:
        self._split = split
        self._settings = settings
        selection = Selection(settings.selection_metric)
        selected = () if selection.k is None else (selection.k,)
        self._top_k: Sequence[int] = sorted({*settings.retrieval_metric_top_k, *selected})
        self._label = torch.from_numpy(split.label).to(split.device)
        self.queries = select_queries(
            self._label,
            settings.retrieval_metric_max_queries,
            settings.retrieval_metric_per_building_limit,
            seed,
        )
        self.triplets = self._fixed_triplets(difficulty, min_distance_m, seed)

    @property
    def images(self) -> int:
        """Images that each query is looked for in."""
        return len(self._label)

    def measure(self, projector: Projector) -> dict[str, float]:
        """`loss`, `recall@k` for every k, `map` and `mrr`."""
        vectors = project(projector, self._split.values)
        found = retrieval_metrics(vectors, self._label, self.queries, self._top_k)
        losses = triplet_losses(vectors[self.triplets], self._settings.margin, self._settings.loss_distance)
        return {
            "loss": float(losses.double().mean()),
            **{f"recall@{k}": recall for k, recall in found.recall.items()},
            "map": found.mean_average_precision,
            "mrr": found.mean_reciprocal_rank,
        }

    def _fixed_triplets(self, difficulty: Path, min_distance_m: float, seed: int) -> Tensor:
        """(3T,) rows: T anchors, positives, negatives, drawn on the CPU so that every device gets the same."""
        split = self._split
        generator = torch.Generator().manual_seed(seed)
        chosen = np.flatnonzero(split.has_partner)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)[:_TRIPLETS].numpy()]
        wanted = np.zeros(len(split.label), dtype=np.bool_)
        wanted[chosen] = True
        candidates, _ = load_candidates(
            difficulty,
            split.image_ids,
            split.building_ids,
            split.label,
            wanted,
            positions=split.positions,
            min_distance_m=min_distance_m,
        )
        sampler = TripletSampler(
            BuildingRows.of(torch.from_numpy(split.label), len(split.building_ids)),
            candidates,
            BandUCB(0.0, _TRIPLETS),
            generator,
            positions=None if split.positions is None else torch.from_numpy(split.positions),
            min_chord=chord_of(min_distance_m),
            anchors=torch.from_numpy(chosen),
        )
        return next(iter(sampler.epoch(_TRIPLETS))).rows.to(split.device)
