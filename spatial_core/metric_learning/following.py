"""A training run on a process that is not the first of several: its share of every epoch, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from spatial_core.interruption import stop_requested
from spatial_core.metric_learning.ranks import Ranks
from spatial_core.metric_learning.trainer import Trainer


@dataclass(frozen=True)
class Order:
    """What the first rank tells the others before an epoch.

    Args:
        epoch: its number, from 1.
        state: of its trainer, which all of them begin from; on the CPU.
    """

    epoch: int
    state: Mapping[str, Tensor]


def follow(trainer: Trainer, ranks: Ranks, seed: int) -> Any:
    """Train when the first rank does, until it says that the run is over.

    Args:
        trainer: a head that was just initialised, with the sampler all ranks have.
        ranks: of this run.
        seed: of the run.

    Returns:
        What the run gave on the first rank.

    Raises:
        SpatialError: the failure that ended it there.
        RankLost: if another rank is gone.
    """
    while isinstance(heard := ranks.hear(), Order):
        if ranks.any(stop_requested()):
            continue  # the first rank says how the run ends
        trainer.load_state(heard.state)
        ranks.seed_dropout(seed, heard.epoch)
        trainer.epoch(lambda seen, loss: None)
    return heard
