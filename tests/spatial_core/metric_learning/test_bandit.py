"""The dealt batch against a plain sequential UCB, and whether rewards really move the bands."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_core.metric_learning.bandit import BANDS, NO_BAND, BandUCB

ALL = 2**BANDS - 1


def plain_score(counts: list[float], sums: list[float], band: int, c: float, extra: float = 0.0) -> float:
    """Mean plus exploration term; unseen bands come first and borrow the overall mean while only simulated."""
    total = max(sum(counts), 1)
    if counts[band] + extra == 0:
        return math.inf
    mean = sums[band] / counts[band] if counts[band] else sum(sums) / total
    return mean + c * math.sqrt(math.log(total) / (counts[band] + extra))


def plain_deal(counts: list[float], sums: list[float], bands: list[int], size: int, c: float) -> list[int]:
    """Pick after pick, each raising its band's count at once; of equal scores the one picked less often."""
    picked = [0] * BANDS
    for _ in range(size):
        best = max(bands, key=lambda band: (plain_score(counts, sums, band, c, picked[band]), -picked[band], -band))
        picked[best] += 1
    return picked


def bandit(counts: list[float], sums: list[float], c: float = 2.0, warmup: int = 0) -> BandUCB:
    made = BandUCB(c, warmup)
    made.load_state(
        {"counts": torch.tensor(counts, dtype=torch.float64), "sums": torch.tensor(sums, dtype=torch.float64)}
    )
    return made


def members(available: int) -> list[int]:
    return [band for band in range(BANDS) if available >> band & 1]


statistics = st.lists(
    st.tuples(st.one_of(st.just(0), st.integers(1, 500)), st.floats(-1, 1)), min_size=BANDS, max_size=BANDS
)


@settings(max_examples=100, deadline=None)
@given(statistics=statistics, available=st.integers(1, ALL), size=st.integers(1, 64), c=st.floats(0.01, 4))
def test_a_batch_is_dealt_as_a_sequential_ucb_would_with_rewards_outstanding(
    statistics: list[tuple[int, float]], available: int, size: int, c: float
) -> None:
    # A little noise on every mean keeps two bands from scoring equal, which rounding would decide.
    counts = [float(n) for n, _ in statistics]
    sums = [n * (mean + 1e-4 * math.sin(i + 1.7 * n)) for i, (n, mean) in enumerate(statistics)]
    dealt = (bandit(counts, sums, c).deal(size)[available] * size).round().int().tolist()
    assert dealt == plain_deal(counts, sums, members(available), size, c)


@settings(max_examples=50, deadline=None)
@given(statistics=statistics)
def test_scores_equal_the_formula(statistics: list[tuple[int, float]]) -> None:
    counts = [float(n) for n, _ in statistics]
    sums = [n * mean for n, mean in statistics]
    expected = [plain_score(counts, sums, band, 2.0) for band in range(BANDS)]
    assert bandit(counts, sums).scores().tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, 64, 100, 256, 1000])
def test_every_set_of_bands_gets_its_whole_batch_and_nothing_else(size: int) -> None:
    for warmup in (0, 10_000):
        shares = bandit([10, 0, 5, 50, 7, 8, 9], [1, 0, 2, 9, 3, 0, 4], warmup=warmup).deal(size)
        assert shares[0].tolist() == [0.0] * BANDS
        for available in range(1, ALL + 1):
            outside = [band for band in range(BANDS) if not available >> band & 1]
            assert float(shares[available].sum()) == pytest.approx(1, abs=1e-6)
            assert not shares[available, outside].any()


def test_warm_up_is_uniform_over_available_bands_until_enough_samples_are_rewarded() -> None:
    made = bandit([990, 0, 0, 0, 0, 0, 0], [0] * BANDS, warmup=1000)
    available = torch.full((6000,), 0b0101001)
    chosen = torch.bincount(made.choose(available), minlength=BANDS)
    assert chosen.tolist() == [2000, 0, 0, 2000, 0, 2000, 0]
    made.update(torch.zeros(10, dtype=torch.int64), torch.zeros(10))
    assert torch.bincount(made.choose(available), minlength=BANDS).tolist() != chosen.tolist()


def test_no_band_available_is_said_and_never_rewarded() -> None:
    made = BandUCB(2.0, 0)
    bands = made.choose(torch.tensor([0, 1, 0, 4]))
    assert bands.tolist() == [NO_BAND, 0, NO_BAND, 2]
    made.update(bands, torch.tensor([5.0, 1.0, 5.0, 2.0]))
    assert made.counts.tolist() == [1, 0, 1, 0, 0, 0, 0]
    assert made.sums.tolist() == [1, 0, 2, 0, 0, 0, 0]


def test_choices_of_mixed_sets_stay_inside_each_anchors_set() -> None:
    generator = torch.Generator().manual_seed(4)
    available = torch.randint(0, ALL + 1, (5000,), generator=generator)
    made = bandit([100, 3, 50, 0, 10, 70, 5], [10, 3, 5, 0, 1, 7, 2])
    for anchors in available.split(250):
        bands = made.choose(anchors)
        for mask, band in zip(anchors.tolist(), bands.tolist(), strict=True):
            assert band == NO_BAND if mask == 0 else mask >> band & 1


def simulate_sequential(planted: list[float], steps: int, c: float) -> list[float]:
    counts, sums = [0.0] * BANDS, [0.0] * BANDS
    for _ in range(steps):
        best = max(range(BANDS), key=lambda band: (plain_score(counts, sums, band, c), -band))
        counts[best] += 1
        sums[best] += planted[best]
    return [count / steps for count in counts]


@pytest.mark.parametrize("best", [0, 3, 6])
@pytest.mark.parametrize("batch", [32, 256])
def test_planted_rewards_steer_the_bands_as_a_sequential_ucb_would(best: int, batch: int) -> None:
    planted = [0.3 + 0.02 * band for band in range(BANDS)]
    planted[best] = 0.9
    c, steps = 0.3, 16_384
    made = BandUCB(c, 0)
    for _ in range(steps // batch):
        bands = made.choose(torch.full((batch,), ALL))
        made.update(bands, torch.tensor(planted)[bands])
    shares = (made.counts / made.counts.sum()).tolist()
    expected = simulate_sequential(planted, steps, c)
    assert shares[best] > 0.8
    assert shares == pytest.approx(expected, abs=0.03)


def test_when_rewards_change_the_shares_follow() -> None:
    made = BandUCB(0.2, 500)
    generator = random.Random(1)

    def run(planted: list[float], batches: int) -> list[float]:
        before = made.counts.clone()
        for _ in range(batches):
            available = torch.tensor([generator.randrange(1, ALL + 1) for _ in range(256)])
            bands = made.choose(available)
            made.update(bands, torch.tensor(planted)[bands])
        gained = made.counts - before
        return (gained / gained.sum()).tolist()

    first = run([0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], 60)
    # Half of the random sets hold band 0, so it cannot get more than about half of the samples.
    assert 0.4 < first[0] < 0.6
    second = run([0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9], 400)
    assert second[6] > 0.35
    assert second[6] > second[0]


def test_one_batch_is_spread_rather_than_put_on_one_band() -> None:
    made = bandit([400.0] * BANDS, [100 + band / 10 for band in range(BANDS)])
    chosen = torch.bincount(made.choose(torch.full((256,), ALL)), minlength=BANDS)
    assert int(chosen.max()) < 50


def test_state_round_trip() -> None:
    made = bandit([1, 2, 3, 4, 5, 6, 7], [0.5] * BANDS)
    other = BandUCB(2.0, 0)
    other.load_state(made.state())
    assert torch.equal(other.scores(), made.scores())
