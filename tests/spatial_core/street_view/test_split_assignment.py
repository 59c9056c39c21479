"""Splits: ratios, stability, and the shape of the hash."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from spatial_core.config.sections import DataSection
from spatial_core.geo.grid import grid_cells
from spatial_core.street_view.building_index import BuildingIndex, index_buildings
from spatial_core.street_view.split_assignment import DROPPED, assign_splits, hash_fractions


def city(count: int, seed: int, dataset: int = 1, images: int = 2) -> BuildingIndex:
    """Buildings over 20 x 20 km with `images` images each."""
    rng = np.random.default_rng(seed)
    target = np.sort(rng.choice(10 * count, count, replace=False))
    lat, lon = 45 + rng.uniform(0, 0.18, count), 9 + rng.uniform(0, 0.25, count)
    rows = np.repeat(np.arange(count), images)
    return index_buildings(np.full(len(rows), dataset), target[rows], np.arange(len(rows)), lat[rows], lon[rows])


def settings(**changes: Any) -> DataSection:
    return DataSection(**changes)


def subset(index: BuildingIndex, chosen: npt.NDArray[np.int64]) -> BuildingIndex:
    names = ("dataset", "target", "images", "patch", "lat", "lon")
    return BuildingIndex(*(getattr(index, name)[chosen] for name in names))


@pytest.mark.parametrize(("count", "seed"), [(2000, 0), (20_000, 42)])
def test_ratios_hold_within_sampling_error(count: int, seed: int) -> None:
    split = assign_splits(city(count, 1), settings(), seed)
    for code, ratio in enumerate((0.7, 0.15, 0.15)):
        error = np.sqrt(ratio * (1 - ratio) / count)
        assert np.mean(split == code) == pytest.approx(ratio, abs=4 * error)


def test_block_ratios_hold_within_the_sampling_error_of_cells() -> None:
    index = city(20_000, 1)
    split = assign_splits(index, settings(split_strategy="spatial_block", block_size_m=500.0), 42)
    cells = len({*zip(*(part.tolist() for part in grid_cells(index.lat, index.lon, 500.0)), strict=True)})
    assert cells > 1000
    for code, ratio in enumerate((0.7, 0.15, 0.15)):
        assert np.mean(split == code) == pytest.approx(ratio, abs=5 * np.sqrt(ratio * (1 - ratio) / cells))


@hypothesis_settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["building", "spatial_block"]), st.integers(1, 300))
def test_a_building_keeps_its_split_whatever_is_added(seed: int, strategy: Any, count: int) -> None:
    index = city(300, 3)
    data = settings(split_strategy=strategy)
    chosen = np.sort(np.random.default_rng(seed).choice(300, count, replace=False))
    alone = assign_splits(subset(index, chosen), data, seed)
    assert alone.tolist() == assign_splits(index, data, seed)[chosen].tolist()


def test_buildings_of_one_cell_share_a_split() -> None:
    index = city(5000, 5)
    split = assign_splits(index, settings(split_strategy="spatial_block", block_size_m=2000.0), 1)
    row, column = grid_cells(index.lat, index.lon, 2000.0)
    by_cell: dict[tuple[int, int], set[int]] = {}
    for i in range(len(index)):
        by_cell.setdefault((int(row[i]), int(column[i])), set()).add(int(split[i]))
    assert all(len(found) == 1 for found in by_cell.values())
    assert len(set().union(*by_cell.values())) == 3


def test_singletons_are_dropped_and_pairs_are_not() -> None:
    assert (assign_splits(city(100, 0, images=1), settings(), 0) == DROPPED).all()
    assert (assign_splits(city(100, 0, images=2), settings(), 0) != DROPPED).all()


@pytest.mark.parametrize(
    ("ratios", "allowed"),
    [((1, 0, 0), {0}), ((0, 1, 0), {1}), ((0, 0, 1), {2}), ((0.7, 0.3, 0), {0, 1}), ((0.5, 0, 0.5), {0, 2})],
)
def test_a_ratio_of_zero_gives_no_building(ratios: tuple[float, float, float], allowed: set[int]) -> None:
    names = ("train_ratio", "val_ratio", "test_ratio")
    data = settings(**dict(zip(names, ratios, strict=True)))
    assert set(assign_splits(city(2000, 0), data, 0).tolist()) == allowed


def test_another_seed_is_another_split() -> None:
    index = city(2000, 0)
    same = np.mean(assign_splits(index, settings(), 1) == assign_splits(index, settings(), 2))
    assert same == pytest.approx(0.7**2 + 2 * 0.15**2, abs=0.05)


def plain_hash(key: str, first: int, second: int) -> float:
    """The same hash in Python's unbounded integers."""

    def finalise(z: int) -> int:
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    digest = hashlib.sha256(key.encode()).digest()
    mixed = finalise(first % 2**64 ^ int.from_bytes(digest[:8], "little"))
    mixed = finalise((mixed + second) % 2**64 ^ int.from_bytes(digest[8:16], "little"))
    return (mixed >> 11) / 2**53


def test_the_hash_is_pinned() -> None:
    # If this changes, every published split changes: raise CODE_VERSION of the stage and say so.
    fractions = hash_fractions("building 42", np.array([0, 1, 201]), np.array([0, 1, 663]))
    assert fractions.tolist() == [0.774170343364715, 0.6341066706961344, 0.25995503174397616]


@hypothesis_settings(deadline=None)
@given(st.text(max_size=9), st.integers(-(2**63), 2**63 - 1), st.integers(-(2**63), 2**63 - 1))
def test_the_hash_agrees_with_unbounded_integers(key: str, first: int, second: int) -> None:
    assert hash_fractions(key, np.array([first]), np.array([second]))[0] == plain_hash(key, first, second)


def test_the_hash_is_uniform_and_every_bit_of_its_input_matters() -> None:
    numbers = np.arange(100_000)
    for first, second in ((numbers, np.zeros_like(numbers)), (np.zeros_like(numbers), numbers)):
        fractions = hash_fractions("k", first, second)
        counts, _ = np.histogram(fractions, bins=100, range=(0, 1))
        assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square with 99 degrees of freedom, p < 1e-4
        assert abs(np.corrcoef(fractions[1:], fractions[:-1])[0, 1]) < 0.02
    bits = np.int64(1) << np.arange(63)
    assert len(set(hash_fractions("k", bits, bits * 0)) | set(hash_fractions("k", bits * 0, bits))) == 126
    assert hash_fractions("k", numbers, numbers[::-1].copy()).max() < 1
