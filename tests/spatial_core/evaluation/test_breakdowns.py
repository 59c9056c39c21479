"""Breakdowns against plain loops over queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from spatial_core.evaluation.bands import band_breakdowns, read_look_alikes
from spatial_core.evaluation.breakdowns import angle_breakdown, distance_breakdown, nearest_angles, views_breakdown
from spatial_core.evaluation.pairs import BuildingIndex, pair_cosines, positive_pairs
from spatial_core.evaluation.results import Bin
from spatial_core.evaluation.scores import Intervals, Queries, run_queries
from spatial_core.evaluation.spaces import build_spaces
from spatial_core.evaluation.split_data import SplitData, read_split
from spatial_core.metric_learning.checkpoint import load_checkpoint
from spatial_core.retrieval.metrics import TIE, select_queries

INTERVALS = Intervals(samples=20, confidence=0.9, seed=0)


@pytest.fixture
def measured(make_lake: Callable[..., object]) -> tuple[object, SplitData, dict[str, torch.Tensor], Queries]:
    lake = make_lake({"train": 5, "test": 40}, pictures=False)
    split = read_split(lake.merged / "test.parquet", "test")
    spaces = build_spaces(split, load_checkpoint(lake.checkpoint).projector, None, torch.device("cpu"), seed=1)
    rows = select_queries(split.labels, 100, 3, seed=1)
    return lake, split, spaces, run_queries(spaces, split.labels, rows, torch.device("cpu"))


def test_images_of_buildings() -> None:
    labels = torch.tensor([2, 0, 2, 1, 0, 2])
    owner, image = BuildingIndex.of(labels).expand(np.array([2, 1, 2]))
    assert list(zip(owner.tolist(), image.tolist(), strict=True)) == [
        (0, 0), (0, 2), (0, 5), (1, 3), (2, 0), (2, 2), (2, 5),
    ]  # fmt: skip
    owner, image = positive_pairs(labels, torch.tensor([5, 1]))
    assert list(zip(owner.tolist(), image.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 4)]


def test_pair_cosines_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spatial_core.evaluation.pairs._BLOCK_BYTES", 8 * 4 * 3)
    vectors = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    left, right = np.array([0, 1, 2, 3, 4, 5, 6]), np.array([8, 8, 1, 3, 0, 2, 7])
    expected = [float(vectors[a] @ vectors[b]) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(pair_cosines(vectors, left, right), expected, atol=1e-6)


def test_angles_agree_with_a_loop_and_skip_what_has_no_bearing(measured: tuple) -> None:
    _, split, _, queries = measured
    camera = split.camera.copy()
    camera[int(queries.rows[0])] = 0.0  # a camera at the facade point
    camera[int(queries.rows[1])] = np.nan
    split = type(split)(**{**vars(split), "camera": camera})
    found = nearest_angles(split, queries)
    for place, row in enumerate(queries.rows.tolist()):
        angles = []
        for other in range(len(split)):
            if other != row and split.labels[other] == split.labels[row]:
                (x, y), (u, v) = camera[row], camera[other]
                if math.hypot(x, y) > 0.01 and math.hypot(u, v) > 0.01:
                    cosine = (x * u + y * v) / math.hypot(x, y) / math.hypot(u, v)
                    angles.append(math.degrees(math.acos(max(-1.0, min(1.0, cosine)))))
        if angles:
            assert found[place] == pytest.approx(min(angles), abs=1e-4)
        else:
            assert np.isnan(found[place])
    assert np.isnan(found[:2]).all()
    assert angle_breakdown(split, queries, INTERVALS).unknown >= 2


def test_angles_across_north_are_small() -> None:
    bearings = np.radians([179.0, -179.0, 90.0])
    camera = np.stack([np.sin(bearings), np.cos(bearings)], axis=1) * 10
    labels = torch.tensor([0, 0, 0])
    split = SplitData("x", torch.eye(3), labels, pa.array(["a"]), pa.array(["1", "2", "3"]), np.zeros(3), camera, None)
    queries = Queries(torch.tensor([0, 2]), np.zeros(2, np.int64), np.array([2, 2]), {})
    np.testing.assert_allclose(nearest_angles(split, queries), [2.0, 89.0], atol=1e-9)


def test_bins_hold_every_known_query_once(measured: tuple) -> None:
    _, split, _, queries = measured
    right = queries.outcomes["projector"].first_rank.numpy() == 1
    distance = split.distance_m[queries.rows.numpy()]
    for found, values, edges in (
        (distance_breakdown(split, queries, INTERVALS), distance, [0, 5, 10, 15, 20, 30, 50, 100, np.inf]),
        (views_breakdown(split, queries, INTERVALS), queries.positives, [1, 2, 3, 4, 5, 6, np.inf]),
    ):
        expected = []
        for low, high in pairwise(edges):
            inside = (values >= low) & (values < high)
            if inside.any():
                expected.append((int(inside.sum()), len(set(queries.buildings[inside])), float(right[inside].mean())))
        bins = [(b.queries, b.buildings, b.scores["projector"].value) for b in found.bins]
        assert np.array(bins) == pytest.approx(np.array(expected))
        assert sum(entry.queries for entry in found.bins) == len(queries.rows)
        assert "random" not in found.bins[0].scores
    views = views_breakdown(split, queries, INTERVALS)
    assert [entry.chance for entry in views.bins] == pytest.approx(
        [int(entry.label) / (len(split) - 1) for entry in views.bins]
    )


def test_without_geometry_the_reason_is_given(measured: tuple) -> None:
    _, split, _, queries = measured
    bare = type(split)(**{**vars(split), "camera": None, "distance_m": None})
    assert "not recorded" in angle_breakdown(bare, queries, INTERVALS).note
    assert "not recorded" in distance_breakdown(bare, queries, INTERVALS).note
    assert np.isnan(nearest_angles(bare, queries)).all()
    blank = type(split)(**{**vars(split), "distance_m": np.full(len(split), np.nan)})
    assert distance_breakdown(blank, queries, INTERVALS).unknown == len(queries.rows)
    assert distance_breakdown(blank, queries, INTERVALS).note


def test_bands_agree_with_a_loop_over_queries(measured: tuple) -> None:
    lake, split, spaces, queries = measured
    table = {row["target_coord_hash"]: row for row in pq.read_table(lake.difficulty).to_pylist()}
    names = split.buildings.to_pylist()
    vectors = spaces["projector"]
    outcomes: dict[int, list[tuple[bool, float, int, int]]] = {}
    for row in queries.rows.tolist():
        entry = table[split.images[row].as_py()]
        bands: dict[str, int] = {}
        for building, band in zip(entry["neighbor_building_ids"], entry["neighbor_bands"], strict=True):
            if building in names:
                bands[building] = min(band, bands.get(building, 9))
        own = [i for i in range(len(split)) if split.labels[i] == split.labels[row] and i != row]
        best = max(float(vectors[row] @ vectors[i]) for i in own)
        for number in set(bands.values()):
            rivals = [
                float(vectors[row] @ vectors[i])
                for i in range(len(split))
                if bands.get(names[int(split.labels[i])]) == number
            ]
            won = [rival < best - TIE for rival in rivals]
            outcomes.setdefault(number, []).append((all(won), float(np.mean(won)), len(own), len(rivals)))
    recall, pairs = band_breakdowns(
        read_look_alikes(lake.difficulty, split, queries.rows), split, spaces, queries, INTERVALS
    )
    assert [entry.extra["band"] for entry in recall.bins] == sorted(outcomes)

    def check(entry: Bin, values: list[float], chance: list[float], rivals: list[int]) -> None:
        assert entry.queries == len(values)
        assert entry.scores["projector"].value == pytest.approx(np.mean(values))
        assert entry.chance == pytest.approx(np.mean(chance))
        assert entry.extra["mean_look_alike_images"] == pytest.approx(np.mean(rivals), abs=1e-3)

    for whole, single in zip(recall.bins, pairs.bins, strict=True):
        found = outcomes[int(whole.extra["band"])]
        rivals = [count for *_, count in found]
        check(whole, [won for won, *_ in found], [own / (own + count) for *_, own, count in found], rivals)
        check(single, [share for _, share, *_ in found], [own / (own + 1) for *_, own, _ in found], rivals)


def test_a_table_of_other_images_gives_the_reason(measured: tuple) -> None:
    lake, split, spaces, queries = measured
    table = pq.read_table(lake.difficulty)
    renamed = pa.array([f"x{name}" for name in table.column(0).to_pylist()])
    pq.write_table(table.set_column(0, table.schema.field(0), renamed), lake.difficulty)
    found = read_look_alikes(lake.difficulty, split, queries.rows)
    recall, pairs = band_breakdowns(found, split, spaces, queries, INTERVALS)
    assert not recall.bins and not pairs.bins and "no neighbour" in recall.note
    assert recall.unknown == len(queries.rows)
