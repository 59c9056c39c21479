"""UCB over difficulty bands: which band the negatives of a batch come from.

A sequential UCB picks one band, sees its reward, and picks again. Training sees rewards a batch at a time, and one
argmax for a whole batch would take all its negatives from one band. So a batch is dealt out as the sequential rule
would deal it while rewards are awaited: every pick raises the count of its band at once, which lowers that band's
exploration term, while means and the total stand still until the batch is rewarded. An anchor can only use bands it
has candidates in, so this is worked out for each of the 127 possible sets of bands, all of them together in a few
tensor operations: bands' scores at successive simulated counts are sorted once, and a set's picks are the best scores
among its own bands; of equal scores the band picked less often comes first.

Once many samples are rewarded, a batch changes scores by next to nothing. So a deal is worked out for 1/64 of the
samples rewarded so far, or for a batch if that is more, and used until as many are drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

BANDS = 7
# The slot of a negative that was drawn at random because its anchor has no candidate in any band.
NO_BAND = BANDS
# Batches are dealt in this many equal shares at most: a share of 1/64 is finer than the noise of one batch's rewards,
# and the table to sort stays at 448 scores whatever the batch.
_SHARES = 64
# A deal holds for this share of the samples rewarded so far: it bounds how far scores can move meanwhile.
_LAG = 64


class BandUCB:
    """Rewards of the bands, and the deal of the next batch.

    Args:
        exploration: c, the weight of the exploration term c * sqrt(ln(total) / count).
        warmup: rewarded samples that are drawn uniformly over an anchor's bands before scores decide.
        device: where statistics live; nothing here waits for the device.
    """

    def __init__(self, exploration: float, warmup: int, device: torch.device | None = None) -> None:
        self.exploration = exploration
        self.warmup = warmup
        self.counts = torch.zeros(BANDS, dtype=torch.float64, device=device)
        self.sums = torch.zeros(BANDS, dtype=torch.float64, device=device)
        sets = torch.arange(2**BANDS, device=device)
        self._members = ((sets[:, None] >> torch.arange(BANDS, device=device)) & 1).float()  # (128, 7)
        self._uniform = self._members / self._members.sum(1, keepdim=True).clamp(min=1)
        self._slots = torch.eye(BANDS + 1, dtype=torch.float64, device=device)
        self._onehot = torch.eye(BANDS, device=device)
        self._places: dict[int, Tensor] = {}
        self._limits = self._uniform
        self._drawn = 0
        self._left = 0

    def means(self) -> Tensor:
        """(7,) mean reward of each band; the mean over all bands for one not seen yet, 0 before any."""
        overall = self.sums.sum() / self.counts.sum().clamp(min=1)
        return torch.where(self.counts > 0, self.sums / self.counts, overall)

    def scores(self, simulated: Tensor | float = 0.0) -> Tensor:
        """Mean reward plus exploration term of each band, infinite for a band without a sample.

        Args:
            simulated: (..., 1) samples to count on top of the rewarded ones.

        Returns:
            (..., 7) scores.
        """
        counts = self.counts + simulated
        spread = self.counts.sum().clamp(min=1).log() * self.exploration**2
        return torch.where(counts > 0, self.means() + (spread / counts).sqrt(), torch.inf)

    def deal(self, size: int) -> Tensor:
        """(128, 7): for each set of available bands (bit b = band b), the share of a batch of `size` each band gets.

        Rows sum to 1, but for the empty set, whose row is 0.
        """
        shares = min(size, _SHARES)
        simulated = torch.arange(shares, dtype=torch.float64, device=self.counts.device)[:, None] * (size / shares)
        scores = self.scores(simulated)  # (shares, 7)
        picks = scores.flatten().sort(descending=True, stable=True).indices % BANDS
        taken = self._onehot[picks].cumsum(0)  # (7 shares, 7) picks of each band so far
        reached = self._members @ taken.T  # (128, 7 shares) of those, the ones a set may use
        last = torch.searchsorted(reached, self._members.new_full((len(reached), 1), shares)).squeeze(1)
        steered = taken[last.clamp(max=len(picks) - 1)] * self._members / shares
        return torch.where(self.counts.sum() < self.warmup, self._uniform, steered)

    def begin_epoch(self) -> None:
        """Forget the current deal; waits for the device. A resumed run starts its epoch from the same state."""
        self._drawn = int(self.counts.sum())
        self._left = 0

    def choose(self, available: Tensor) -> Tensor:
        """A band for each anchor.

        Args:
            available: (B,) int64 bit sets of the bands each anchor has candidates in. The order must be random, for
                the bands are dealt along it.

        Returns:
            (B,) int64 band, `NO_BAND` where none is available.
        """
        size = len(available)
        if self._left < size:
            self._left = max(size, self._drawn // _LAG) if self._drawn >= self.warmup else size
            self._limits = self.deal(self._left).cumsum(1)
        self._left -= size
        self._drawn += size
        if size not in self._places:
            self._places[size] = (torch.arange(size, device=available.device)[:, None] + 0.5) / size
        # Rounding may leave the last limit a little under 1; places stay clear of it by half a sample.
        return (self._limits[available] <= self._places[size]).sum(1)

    def update(self, bands: Tensor, rewards: Tensor) -> None:
        """Add rewards (B,) of samples whose negatives came from `bands` (B,); those of `NO_BAND` count for nothing."""
        slots = self._slots[bands]  # products instead of index_add_, whose order of additions varies on CUDA
        self.counts += slots.sum(0)[:BANDS]
        self.sums += (rewards.double() @ slots)[:BANDS]

    def state(self) -> dict[str, Tensor]:
        return {"counts": self.counts.cpu(), "sums": self.sums.cpu()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
