"""Losses against plain loops and against torch's own, gradients included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from spatial_core.metric_learning.losses import Distance, rewards, triplet_losses


def plain_losses(vectors: list[list[float]], margin: float, distance: str) -> list[float]:
    def apart(a: list[float], b: list[float]) -> float:
        if distance == "euclidean":
            return math.sqrt(sum((x - y + 1e-6) ** 2 for x, y in zip(a, b, strict=True)))
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return 1 - dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    count = len(vectors) // 3
    return [
        max(0.0, margin + apart(vectors[i], vectors[count + i]) - apart(vectors[i], vectors[2 * count + i]))
        for i in range(count)
    ]


def vectors_of(seed: int, count: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(3 * count, dim, generator=generator, dtype=torch.float64), dim=1)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 9),
    dim=st.integers(1, 12),
    margin=st.floats(0.01, 2.0),
    distance=st.sampled_from(["euclidean", "cosine"]),
)
def test_losses_equal_a_plain_loop(seed: int, count: int, dim: int, margin: float, distance: Distance) -> None:
    vectors = vectors_of(seed, count, dim)
    expected = torch.tensor(plain_losses(vectors.tolist(), margin, distance), dtype=torch.float64)
    assert torch.allclose(triplet_losses(vectors, margin, distance), expected, atol=1e-12)


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_values_and_gradients_equal_torchs_losses(distance: Distance) -> None:
    ours = vectors_of(1, 64, 16).float().requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    reference: nn.Module = nn.TripletMarginLoss(margin=0.5, p=2)
    if distance == "cosine":
        reference = nn.TripletMarginWithDistanceLoss(
            distance_function=lambda a, b: 1 - functional.cosine_similarity(a, b), margin=0.5
        )
    loss = triplet_losses(ours, 0.5, distance).mean()
    expected = reference(*theirs.chunk(3))
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-9)  # type: ignore[arg-type]


def test_identical_vectors_have_a_finite_gradient() -> None:
    vectors = torch.ones(3, 4).requires_grad_()
    triplet_losses(vectors, 0.5, "euclidean").sum().backward()
    assert vectors.grad is not None
    assert bool(torch.isfinite(vectors.grad).all())


def test_rewards() -> None:
    losses = torch.tensor([0.0, 0.25, 1.5], requires_grad=True)
    assert rewards(losses, "negative_loss").tolist() == [0.0, -0.25, -1.5]
    assert rewards(losses, "active_fraction").tolist() == [0.0, 1.0, 1.0]
    assert not rewards(losses, "negative_loss").requires_grad
