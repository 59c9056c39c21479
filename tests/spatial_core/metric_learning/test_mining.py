"""Triplets against the rules they must obey, sample by sample."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.errors import InputError
from spatial_core.geo.sphere import unit_vectors
from spatial_core.metric_learning.bandit import BANDS, NO_BAND, BandUCB
from spatial_core.metric_learning.difficulty_table import Candidates, chord_of
from spatial_core.metric_learning.mining import BuildingRows, TripletSampler

Lists = list[list[tuple[int, int]]]


def flatten(lists: Lists) -> Candidates:
    """[(building, band), ...] of each image -> flat arrays, in a plain loop."""
    start, offsets, available, building = [], [], [], []
    for entries in lists:
        start.append(len(building))
        offsets.append([sum(band < limit for _, band in entries) for limit in range(BANDS + 1)])
        available.append(sum({1 << band for _, band in entries}))
        building += [b for b, _ in sorted(entries, key=lambda entry: entry[1])]
    return Candidates(
        torch.tensor(start),
        torch.tensor(offsets, dtype=torch.int16),
        torch.tensor(available, dtype=torch.uint8),
        torch.tensor(building, dtype=torch.int32),
    )


def sampler(labels: list[int], lists: Lists | None, seed: int = 0, **options: object) -> TripletSampler:
    rows = BuildingRows.of(torch.tensor(labels), max(labels) + 1)
    candidates = None if lists is None else flatten(lists)
    generator = torch.Generator().manual_seed(seed)
    return TripletSampler(rows, candidates, BandUCB(2.0, 20), generator, **options)  # type: ignore[arg-type]


@st.composite
def splits(draw: st.DrawFn) -> tuple[list[int], Lists]:
    buildings = draw(st.integers(2, 6))
    extra = draw(st.lists(st.integers(0, buildings - 1), min_size=1, max_size=25))
    labels = draw(st.permutations([*range(buildings), *extra]))
    lists = [
        [
            (building, band)
            for building, band in draw(
                st.lists(st.tuples(st.integers(0, buildings - 1), st.integers(0, BANDS - 1)), max_size=6)
            )
            if building != label
        ]
        for label in labels
    ]
    return labels, lists


@settings(max_examples=80, deadline=None)
@given(split=splits(), batch_size=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_triplet_obeys_every_rule(split: tuple[list[int], Lists], batch_size: int, seed: int) -> None:
    labels, lists = split
    drawn = sampler(labels, lists, seed)
    sizes = Counter(labels)
    for _ in range(2):
        anchors: list[int] = []
        for batch in drawn.epoch(batch_size):
            assert 1 <= len(batch.anchors) <= batch_size
            assert len(batch.rows) == 3 * len(batch.anchors)
            columns = (batch.anchors, batch.positives, batch.negatives, batch.bands)
            for anchor, positive, negative, band in zip(*(column.tolist() for column in columns), strict=True):
                assert labels[positive] == labels[anchor]
                assert positive != anchor
                assert labels[negative] != labels[anchor]
                if band == NO_BAND:
                    assert not lists[anchor]
                else:
                    assert (labels[negative], band) in lists[anchor]
            anchors += batch.anchors.tolist()
            drawn.bandit.update(batch.bands, torch.rand(len(batch.bands)))
        assert sorted(anchors) == [row for row, label in enumerate(labels) if sizes[label] > 1]


def test_epochs_differ_and_seeds_repeat() -> None:
    labels = [label for label in range(50) for _ in range(3)]
    one, two = sampler(labels, None, seed=7), sampler(labels, None, seed=7)
    first = torch.cat([batch.rows for batch in one.epoch(16)])
    assert torch.equal(first, torch.cat([batch.rows for batch in two.epoch(16)]))
    assert not torch.equal(first, torch.cat([batch.rows for batch in one.epoch(16)]))


def shares(rows: list[int]) -> dict[int, float]:
    return {row: count / len(rows) for row, count in Counter(rows).items()}


def test_positives_candidates_and_images_are_drawn_uniformly() -> None:
    labels = [0] * 5 + [1] * 4 + [2] * 3
    # Building 1 is listed twice as often as building 2 in band 3.
    lists: Lists = [[(1, 3), (1, 3), (2, 3)]] * 5 + [[]] * 7
    drawn = sampler(labels, lists)
    positives, negatives, random = [], [], []
    for _ in range(4000):
        batch = next(iter(drawn.epoch(12)))
        mine = (batch.anchors == 0).nonzero().item()
        positives.append(int(batch.positives[mine]))
        negatives.append(int(batch.negatives[mine]))
        other = (batch.anchors == 5).nonzero().item()
        random.append(int(batch.negatives[other]))
    assert shares(positives) == pytest.approx(dict.fromkeys((1, 2, 3, 4), 0.25), abs=0.03)
    expected = {5: 1 / 6, 6: 1 / 6, 7: 1 / 6, 8: 1 / 6, 9: 1 / 9, 10: 1 / 9, 11: 1 / 9}
    assert shares(negatives) == pytest.approx(expected, abs=0.025)
    # A random negative: each other building alike, then each of its images.
    expected = {0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1, 9: 1 / 6, 10: 1 / 6, 11: 1 / 6}
    assert shares(random) == pytest.approx(expected, abs=0.025)


def test_bands_are_followed_by_the_sampler() -> None:
    labels = [label for label in range(40) for _ in range(4)]
    lists: Lists = [[((label + 1 + band) % 40, band) for band in range(BANDS)] for label in labels]
    drawn = sampler(labels, lists)
    drawn.bandit.exploration = 0.1
    planted = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.0])
    for _ in range(10):
        before = drawn.bandit.counts.clone()
        for batch in drawn.epoch(32):
            drawn.bandit.update(batch.bands, planted[batch.bands])
    gained = drawn.bandit.counts - before
    assert float(gained[4] / gained.sum()) > 0.8


def line(spacing_m: float, count: int) -> torch.Tensor:
    """Buildings along a meridian."""
    latitude = np.arange(count) * spacing_m / 111_194.9
    return torch.from_numpy(unit_vectors(latitude, np.full(count, 7.0)))


def test_random_negatives_keep_their_distance_where_they_can() -> None:
    labels = [label for label in range(60) for _ in range(2)]
    drawn = sampler(labels, None, positions=line(10.0, 60), min_chord=chord_of(30.0))
    for _ in range(5):
        for batch in drawn.epoch(50):
            apart = (torch.tensor(labels)[batch.anchors] - torch.tensor(labels)[batch.negatives]).abs()
            assert int(apart.min()) >= 3
    assert int(drawn.near_random) == 0


def test_where_everything_is_near_the_farthest_of_the_draws_is_taken_and_counted() -> None:
    labels = [0, 0, 1, 1, 2, 2]
    drawn = sampler(labels, None, positions=line(5.0, 3), min_chord=chord_of(30.0))
    batches = [batch for _ in range(20) for batch in drawn.epoch(6)]
    assert int(drawn.near_random) == 120
    ends = [
        int(labels[n]) for b in batches for a, n in zip(b.anchors.tolist(), b.negatives.tolist(), strict=True) if a < 2
    ]
    assert ends.count(2) > 0.9 * len(ends)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2], [0]])
def test_splits_without_triplets_are_refused(labels: list[int]) -> None:
    with pytest.raises(InputError, match="triplets need two buildings"):
        sampler(labels, None)
