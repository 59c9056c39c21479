"""Triplet losses, one value a triplet, so that the sampler's rewards cost nothing beyond the loss itself.

Numbers are those of torch.nn.TripletMarginLoss(p=2), its eps included, and of TripletMarginWithDistanceLoss with
1 - cosine similarity, before their reduction.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Distance = Literal["euclidean", "cosine"]
Reward = Literal["negative_loss", "active_fraction"]


def distances(first: Tensor, second: Tensor, distance: Distance) -> Tensor:
    """Row-wise distance of two (B, D) tensors -> (B,)."""
    if distance == "cosine":
        return 1 - F.cosine_similarity(first, second)
    return F.pairwise_distance(first, second, p=2, eps=1e-6)


def triplet_losses(vectors: Tensor, margin: float, distance: Distance) -> Tensor:
    """max(0, margin + d(anchor, positive) - d(anchor, negative)) of each triplet.

    Args:
        vectors: (3B, D): B anchors, then their B positives, then their B negatives, as one call of the head gives them.
        margin: how much farther than the positive the negative must be for the loss to vanish.
        distance: between vectors.

    Returns:
        (B,) losses, not reduced.
    """
    anchor, positive, negative = vectors.chunk(3)
    gap = distances(anchor, positive, distance) - distances(anchor, negative, distance)
    return F.relu(gap + margin)


def rewards(losses: Tensor, reward: Reward) -> Tensor:
    """(B,) losses -> (B,) rewards of the bands their negatives came from.

    `negative_loss` is the earlier pipeline's and favours bands whose triplets are already solved; `active_fraction` is
    1 for a triplet that still gives gradient and 0 otherwise, so it favours bands there is something to learn from.
    """
    losses = losses.detach()
    return -losses if reward == "negative_loss" else (losses > 0).to(losses.dtype)
