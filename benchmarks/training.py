"""Training of the projection head, 1024 -> 512 -> 256: one call and one loss a batch, beside the reference loop.

The reference is the earlier pipeline's loop, written from its specification: a data set that draws one triplet a call
in two loader workers, three calls of the head, Adam, and then one loss call a sample for the bandit's reward. Both
compute in fp32; further rows show what shorter arithmetic adds. Sampling, gathering and rewards are inside the measured
time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Prepared, Row, compare, main
from benchmarks.triplet_sampling import ReferenceSampler, our_sampler
from spatial_core.config.sections import TrainingSection
from spatial_core.metric_learning.features import Split
from spatial_core.metric_learning.projector import Projector, ProjectorConfig
from spatial_core.metric_learning.trainer import Precision, Trainer, arithmetic
from spatial_core.storage.hardware import share_cores, usable_cores

DIM = 1024
HEAD = ProjectorConfig(DIM, (512,), 256)
CPU = torch.device("cpu")


def features(rows: int) -> Tensor:
    """(rows, DIM) float32."""
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1))


def load_ours(batch_size: int, precision: Precision) -> Trainer:
    """A trainer on random features."""
    sampler = our_sampler()
    count = len(sampler.rows.label)
    split = Split(
        path=Path("none"),
        values=features(count),
        device=CPU,
        label=sampler.rows.label.numpy(),
        image_ids=pa.nulls(count),
        building_ids=pa.nulls(len(sampler.rows.size)),
        positions=None,
        rows_in_file=count,
        buildings_in_file=len(sampler.rows.size),
        placed="memory",
    )
    trainer = Trainer(Projector(HEAD), split, sampler, TrainingSection(batch_size=batch_size, precision=precision))
    trainer.step(next(iter(sampler.epoch(batch_size))))  # the first step imports and allocates
    return trainer


def run_ours(trainer: Trainer, batch_size: int, batches: int, precision: Precision) -> dict[str, Any]:
    """Train some batches."""
    losses = []
    with arithmetic(precision, CPU, usable_cores(), 0):
        trainer.projector.train()
        for number, batch in enumerate(trainer.sampler.epoch(batch_size)):
            if number == batches:
                break
            losses.append(trainer.step(batch).mean())
    return {"batches": len(losses), "loss": float(losses[-1])}


class ReferenceData(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """One triplet of feature vectors a call."""

    def __init__(self) -> None:
        self.sampler = ReferenceSampler()
        self.features = features(len(self.sampler.label)).half()

    def __len__(self) -> int:
        return len(self.sampler.label)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        anchor, positive, negative, band = self.sampler.sample()
        return (
            self.features[anchor].float(),
            self.features[positive].float(),
            self.features[negative].float(),
            band,
        )


@dataclass
class Reference:
    """The reference loop, its workers started and its first step done."""

    data: ReferenceData
    batches: Iterator[list[Tensor]]
    head: Projector
    optimizer: torch.optim.Optimizer

    def step(self) -> float:
        """One batch: three calls, one update, one loss call a sample."""
        criterion = nn.TripletMarginLoss(margin=0.5, p=2)
        anchor, positive, negative, bands = next(self.batches)
        projected = self.head(anchor), self.head(positive), self.head(negative)
        loss = criterion(*projected)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for sample, band in enumerate(bands.tolist()):
                reward = -criterion(*(vectors[sample : sample + 1] for vectors in projected)).item()
                self.data.sampler.reward(band, reward)
        return float(loss.detach())


def load_reference(batch_size: int) -> Reference:
    """Two loader workers, as the earlier pipeline would have on two cores."""
    torch.set_num_threads(usable_cores())
    data, head = ReferenceData(), Projector(HEAD).train()
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=2)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4, weight_decay=1e-5)
    reference = Reference(data, iter(loader), head, optimizer)
    reference.step()
    return reference


def run_reference(reference: Reference, batches: int) -> dict[str, Any]:
    """Train some batches; the few that the workers have fetched ahead are in the reference's favour."""
    return {"loss": [reference.step() for _ in range(batches)][-1]}


def rows(scale: float = 1.0) -> list[Row]:
    """Lines of the table."""
    share_cores()  # as a stage run does; the contenders' processes inherit it
    measured = []
    for batch_size, precision, target in (
        (256, "fp32", 3.5),
        (1024, "fp32", 3.5),
        (1024, "tf32", None),
        (1024, "bf16", None),
    ):
        batches = max(2, int(12_288 * scale) // batch_size)
        measured.append(
            compare(
                f"training {DIM}-512-256, batch {batch_size}, {precision}",
                "triplets",
                Prepared(
                    partial(load_ours, batch_size, precision),
                    partial(run_ours, batch_size=batch_size, batches=batches, precision=precision),
                ),
                Prepared(partial(load_reference, batch_size), partial(run_reference, batches=batches)),
                items=batches * batch_size,
                note="the same fp32 products take most of ours" if precision == "fp32" else "",
                target=target,
            )
        )
    return measured


if __name__ == "__main__":
    main(rows)
