"""The training step and the epoch: what turns triplets into weights. No files, no validation, no tracking.

Anchors, positives and negatives go through the head in one call, and the per-triplet losses of that call are the
rewards of their bands. Sums stay on the device, so the host never waits for it between batches.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from spatial_core.config.sections import TrainingSection
from spatial_core.errors import ModelError
from spatial_core.metric_learning.bandit import NO_BAND
from spatial_core.metric_learning.features import Split
from spatial_core.metric_learning.losses import rewards, triplet_losses
from spatial_core.metric_learning.mining import Triplets, TripletSampler
from spatial_core.metric_learning.projector import Projector
from spatial_core.metric_learning.ranks import Ranks

Precision = Literal["fp32", "tf32", "bf16"]
# tf32 names the idea everywhere: fp32 storage, matrix products with shortened inputs. A CPU shortens them to bf16.
_MATMUL = {"fp32": "highest", "bf16": "highest", "tf32": "high"}
_MATMUL_CPU = {**_MATMUL, "tf32": "medium"}


@dataclass(frozen=True)
class EpochStats:
    """One pass over all anchors.

    Args:
        triplets: triplets seen.
        loss: mean loss.
        active_fraction: share of triplets with a loss above 0.
        band_shares: share of triplets by band of the negative, `random` for those without candidates.
        band_rewards: mean reward of each band over the whole run so far; None for a band not seen.
    """

    triplets: int
    loss: float
    active_fraction: float
    band_shares: Mapping[str, float]
    band_rewards: Mapping[str, float | None]

    @property
    def diverged(self) -> bool:
        """Whether the loss is no longer a number to go on with."""
        return not math.isfinite(self.loss)


class Trainer:
    """A head, its optimizer and its sampler.

    Args:
        projector: on the training device.
        split: training features.
        sampler: of triplets of `split`; its bandit is rewarded here.
        settings: step size, loss, precision, batch size.
        ranks: the processes that share each batch; default: this one takes it all.
    """

    def __init__(
        self,
        projector: Projector,
        split: Split,
        sampler: TripletSampler,
        settings: TrainingSection,
        ranks: Ranks | None = None,
    ) -> None:
        self.projector = projector
        self.sampler = sampler
        self.optimizer = torch.optim.Adam(
            projector.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._split = split
        self._settings = settings
        self._ranks = ranks or Ranks()

    def epoch(self, after_batch: Callable[[int, Tensor], None]) -> EpochStats:
        """Train on every anchor once.

        Args:
            after_batch: called with the triplets seen so far and the sum of their losses; reading that waits for the
                device.

        Returns:
            Figures of the epoch. They are returned even if training has diverged, so that all ranks finish alike.
        """
        device = self._split.device
        totals = torch.zeros(2, dtype=torch.float64, device=device)
        bands = torch.zeros(NO_BAND + 1, dtype=torch.int64, device=device)
        seen = 0
        self.projector.train()
        for batch in self.sampler.epoch(self._settings.batch_size):
            losses = self.step(batch)
            totals += torch.stack([losses.sum(), (losses > 0).sum()])
            bands += torch.bincount(batch.bands, minlength=NO_BAND + 1)
            seen += len(losses)
            after_batch(seen, totals[0])
        loss, active = (totals / seen).tolist()
        names = [*(str(band) for band in range(NO_BAND)), "random"]
        shares = (bands.double() / seen).tolist()
        counts, sums = self.sampler.bandit.counts.tolist(), self.sampler.bandit.sums.tolist()
        means = [total / count if count else None for count, total in zip(counts, sums, strict=True)]
        return EpochStats(
            triplets=seen,
            loss=loss,
            active_fraction=active,
            band_shares=dict(zip(names, shares, strict=True)),
            band_rewards=dict(zip(names, means, strict=False)),
        )

    def step(self, batch: Triplets) -> Tensor:
        """One update of the weights and of the bandit; returns the (B,) losses, detached."""
        settings = self._settings
        self.optimizer.zero_grad(set_to_none=True)
        if self._ranks.size == 1:
            losses = self._losses(batch)
            losses.mean().backward()  # type: ignore[no-untyped-call]
            losses = losses.detach()
        else:
            losses = self._share_of_step(batch)
        self.optimizer.step()
        self.sampler.bandit.update(batch.bands, rewards(losses, settings.ucb_reward))
        return losses

    def _losses(self, batch: Triplets) -> Tensor:
        settings = self._settings
        features = self._split.take(batch.rows)
        with torch.autocast(features.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            vectors = self.projector(features)
        return triplet_losses(vectors, settings.margin, settings.loss_distance)

    def _share_of_step(self, batch: Triplets) -> Tensor:
        """Gradients of the whole batch, of which this rank works out its share; returns all (B,) losses."""
        total = len(batch.anchors)
        own = batch.part(self._ranks.share(total))
        losses = torch.zeros(0, device=self._split.device)
        if len(own.anchors):
            losses = self._losses(own)
            (losses.sum() / total).backward()  # type: ignore[no-untyped-call]
        return self._ranks.combine(list(self.projector.parameters()), losses.detach(), total)

    def state(self) -> dict[str, Tensor]:
        """Everything the next epoch depends on, by name."""
        state = {f"model.{name}": weight for name, weight in self.projector.state_dict().items()}
        for name, parameter in self.projector.named_parameters():
            for kind, value in self.optimizer.state[parameter].items():
                state[f"adam.{kind}.{name}"] = value
        state |= {f"bandit.{name}": value for name, value in self.sampler.bandit.state().items()}
        state["random.sampler"] = self.sampler.generator.get_state()
        state["random.near"] = self.sampler.near_random
        state["random.torch"] = torch.get_rng_state()
        if self._split.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self._split.device)
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of `state`."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        self.projector.load_state_dict(parts["model"])
        if "adam" in parts:  # nothing has been learned yet in the state that a run begins with
            moments = [
                {kind: parts["adam"][f"{kind}.{name}"] for kind in ("step", "exp_avg", "exp_avg_sq")}
                for name, _ in self.projector.named_parameters()
            ]
            self.load_moments(moments)
        self.sampler.bandit.load_state(parts["bandit"])
        self.sampler.near_random.copy_(parts["random"]["near"])
        self.sampler.generator.set_state(parts["random"]["sampler"])
        torch.set_rng_state(parts["random"]["torch"])
        if "cuda" in parts["random"] and self._split.device.type == "cuda":
            torch.cuda.set_rng_state(parts["random"]["cuda"], self._split.device)

    def load_moments(self, moments: list[dict[str, Tensor]]) -> None:
        """Adam's step, exp_avg and exp_avg_sq of each parameter, in the head's order.

        Raises:
            ModelError: if they belong to another head.
        """
        parameters = list(self.projector.parameters())
        shapes = [tuple(parameter.shape) for parameter in parameters]
        if [tuple(entry["exp_avg"].shape) for entry in moments] != shapes:
            raise ModelError("the optimizer state is that of another projection head")
        groups: list[dict[str, Any]] = self.optimizer.state_dict()["param_groups"]
        state = {index: {**entry, "step": entry["step"].float()} for index, entry in enumerate(moments)}
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device, threads: int, seed: int) -> Iterator[None]:
    """Reproducible computing for the length of the block: seed, number of threads, precision of matrix products.

    Everything is as before afterwards, the random state too. The number of threads is part of what makes two runs
    equal, for it decides the order of additions. Training uses no operation whose result depends on timing.
    """
    precision_before, threads_before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            torch.manual_seed(seed)
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision((_MATMUL if devices else _MATMUL_CPU)[precision])
            yield
        finally:
            torch.set_float32_matmul_precision(precision_before)
            torch.set_num_threads(threads_before)
