"""Charts are well-formed, hold every value, and survive odd data."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from spatial_core.evaluation import svg
from spatial_core.evaluation.history import training_curves
from spatial_core.evaluation.page import verdict
from spatial_core.evaluation.space_map import choose_images, map_spaces
from spatial_core.retrieval.bootstrap import Estimate


def parse(chart: str) -> ET.Element:
    assert not re.search(r"\bnan\b|\binf\b", chart.lower())
    return ET.fromstring(chart)  # noqa: S314 - our own output


def titles(chart: str) -> list[str]:
    return [element.text or "" for element in parse(chart).iter("title")]


def test_bars_whiskers_and_chance() -> None:
    bars = [
        svg.Bars("projector", "Projector", [Estimate(0.5, 0.4, 0.6), None]),
        svg.Bars("backbone", "Raw <b>", [Estimate(0.0, 0.0, 0.0), Estimate(1.0)]),
    ]
    chart = svg.bar_chart(["0 hardest\n12", "1\n3"], bars, [0.25, None], "by band & more")
    assert titles(chart) == [
        "Projector, 0 hardest, 12: 50.0\N{NO-BREAK SPACE}% (40.0 to 60.0)",
        "Raw <b>, 0 hardest, 12: 0.0\N{NO-BREAK SPACE}% (0.0 to 0.0)",
        "chance 25.0\N{NO-BREAK SPACE}%",
        "Raw <b>, 1, 3: 100.0\N{NO-BREAK SPACE}%",
    ]
    assert sum(element.get("class") == "whisker" for element in parse(chart).iter("path")) == 2
    parse(svg.bar_chart([], [], [], "nothing"))


@pytest.mark.parametrize("log_x", [False, True])
def test_lines_keep_their_order_on_both_axes(log_x: bool) -> None:
    chart = svg.line_chart([svg.Line("a", "A", [(1, 0.0), (10, 0.5), (100, 1.0)])], "curve", log_x=log_x)
    circles = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in parse(chart).iter("circle")]
    assert circles == sorted(circles) and circles[0][1] > circles[1][1] > circles[2][1]
    middle = (circles[0][0] + circles[2][0]) / 2
    assert math.isclose(circles[1][0], middle, abs_tol=0.2) == log_x


def test_small_shares_fill_the_chart_and_large_ones_keep_all_of_it() -> None:
    small = parse(svg.line_chart([svg.Line("a", "A", [(1, 0.1), (2, 0.15)])], "small"))
    large = parse(svg.line_chart([svg.Line("a", "A", [(1, 0.1), (2, 0.5)])], "large"))
    assert [text.text for text in small.iter("text")][:5] == ["0%", "4%", "8%", "12%", "16%"]
    assert [text.text for text in large.iter("text")][:5] == ["0%", "25%", "50%", "75%", "100%"]


def test_a_single_point_a_zero_and_no_line_at_all() -> None:
    parse(svg.line_chart([svg.Line("a", "A", [(3, 0.0)])], "point", shares=False))
    parse(svg.line_chart([svg.Line("a", "A", [(1, 0.2)])], "point", log_x=True))
    assert svg.line_chart([], "none") == ""


def test_strips_and_maps() -> None:
    strip = svg.interval_strip([("a", "A", Estimate(0.3, 0.2, 0.4)), ("b", "B", Estimate(0.0))], "strip")
    assert titles(strip) == ["A: 30.0\N{NO-BREAK SPACE}% (20.0 to 40.0)", "B: 0.0\N{NO-BREAK SPACE}%"]
    chart = parse(svg.scatter([(0, 0, "p c1", 'k"1', "<b>"), (1, 1, "", "2", "two")], "map"))
    assert [mark.get("data-b") for mark in chart.iter("circle")] == ['k"1', "2"]


def test_the_history_becomes_four_charts() -> None:
    history = [
        {
            "epoch": epoch,
            "train_loss": 0.5 / epoch,
            "active_fraction": 0.4,
            "band_shares": {"0": 0.5, "6": 0.3, "random": 0.2},
            "band_rewards": {"0": 0.1, "6": None},
            **({"validation": {"loss": 0.6, "recall@100": 0.9, "recall@5": 0.8, "map": 0.5}} if epoch % 2 == 0 else {}),
        }
        for epoch in (1, 2, 3, 4)
    ]
    charts = training_curves(history)
    assert [(chart.title, [line.label for line in chart.lines], chart.shares) for chart in charts] == [
        ("Loss", ["train loss", "validation loss"], False),
        ("Validation recall", ["recall@5", "recall@100"], True),
        ("Triplets that still teach", ["active fraction"], True),
        ("Where the negatives came from", ["0", "6", "random"], True),
    ]
    assert list(charts[0].lines[0].points) == [(1, 0.5), (2, 0.25), (3, 0.5 / 3), (4, 0.125)]
    assert list(charts[1].lines[0].points) == [(2, 0.8), (4, 0.8)]
    assert training_curves([]) == [] == training_curves([{"epoch": 1, "note": "text", "flag": True}])


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        (Estimate(0.2, 0.1, 0.3), "the projector gains <b>+20.0 points</b> (+10.0 to +30.0)"),
        (Estimate(-0.2, -0.3, -0.1), "the projector loses against them: <b>-20.0 points</b> (-30.0 to -10.0)"),
        (Estimate(0.01, -0.02, 0.04), "the difference of <b>+1.0 points</b> (-2.0 to +4.0) may be chance"),
        (Estimate(0.5), "the difference is <b>+50.0 points</b>, from a single building"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(gain: Estimate, words: str) -> None:
    assert verdict(gain) == words


def test_a_map_shows_whole_buildings_up_to_its_limit() -> None:
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    rows = choose_images(labels, 7, seed=0)
    shown = labels[torch.from_numpy(rows)].tolist()
    assert len(rows) <= 7 and 1 not in shown
    assert all(shown.count(label) == labels.tolist().count(label) for label in set(shown))
    assert sorted(choose_images(labels, 100, seed=0).tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_maps_are_reproducible_and_keep_neighbours_together() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 4
    vectors = torch.randn(15, 8, generator=generator)[labels] * 4 + 0.1 * torch.randn(60, 8, generator=generator)
    spaces = {"projector": torch.nn.functional.normalize(vectors)}
    first, second = (map_spaces(spaces, labels, 1000, seed=1) for _ in range(2))
    assert first is not None and second is not None
    flat = first.positions["projector"]
    assert np.array_equal(flat, second.positions["projector"])
    assert flat.min() >= 0 and flat.max() <= 1
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1) + 9 * np.eye(60)
    assert (labels.numpy()[distance.argmin(1)] == labels.numpy()).mean() > 0.95
    assert map_spaces(spaces, torch.arange(60), 1000, seed=1) is None


def test_a_broken_space_still_has_a_map() -> None:
    labels = torch.arange(60) // 4
    half = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    half[:30] = half[0]
    torn = half.clone()
    torn[5], torn[6] = torch.nan, torch.inf
    line = torch.zeros(60, 8)
    line[:, 0] = torch.arange(60)
    spaces = {"collapsed": torch.zeros(60, 8), "half": half, "torn": torn, "line": line, "flat": line[:, :1]}
    found = map_spaces(spaces, labels, 1000, seed=1)
    assert found is not None
    for positions in found.positions.values():
        assert positions.shape == (60, 2) and positions.min() >= 0 and positions.max() <= 1
