"""Sections of the page that are charts: breakdowns, training curves, maps of the space."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spatial_core.evaluation import svg
from spatial_core.evaluation.bands import PAIRS, RECALL
from spatial_core.evaluation.breakdowns import ANGLE, DISTANCE, VIEWS
from spatial_core.evaluation.history import training_curves
from spatial_core.evaluation.measure import Pictures
from spatial_core.evaluation.results import CHANCE, Breakdown, SplitResult
from spatial_core.evaluation.spaces import BACKBONE, PCA, PROJECTOR
from spatial_core.evaluation.wording import METHOD_NAMES
from spatial_core.metric_learning.checkpoint import Checkpoint

COMPARED = (PROJECTOR, BACKBONE, PCA)
_MAP_COLOURS = 12


def legend(methods: Sequence[str], *, chance: bool = False, note: str = "") -> str:
    """Names of methods in their colours, with a remark at the right."""
    spans = [f'<span class="{method}"><i>{METHOD_NAMES[method]}</i></span>' for method in methods]
    if chance:
        spans.append('<span class="chance"><i>chance</i></span>')
    if note:
        spans.append(f"<em>{note}</em>")
    return f'<div class="legend">{"".join(spans)}</div>'


def breakdown_section(shown: SplitResult) -> str:
    """Recall over k, and recall by difficulty, angle, distance and number of right answers."""
    curves = [
        svg.Line(method, METHOD_NAMES[method], list(zip(shown.curve_k, shown.curves[method], strict=True)))
        for method in (*COMPARED, CHANCE)
        if method in shown.curves
    ]
    methods = [method for method in COMPARED if method in shown.scores]
    cards = [
        _card(
            "How deep one has to look",
            "Recall@k over k, on a logarithmic axis.",
            svg.line_chart(curves, "recall at k by method", log_x=True, x_label="k, images looked at"),
        ),
        _bars(
            shown.breakdown(PAIRS),
            methods,
            "Against look-alikes, one at a time",
            "How often the right building's best image scores above an image of a look-alike, by difficulty band.",
        ),
        _bars(
            shown.breakdown(RECALL),
            methods,
            "Against all look-alikes of a band",
            "Recall@1 when only the query's building and its look-alikes of one band are searched.",
        ),
        _bars(
            shown.breakdown(ANGLE),
            methods,
            "By how far the camera went round",
            "Recall@1 by the angle, seen from the facade, to the nearest other camera of the building.",
        ),
        _bars(
            shown.breakdown(DISTANCE),
            methods,
            "By how far away the camera stood",
            "Recall@1 by distance from the facade.",
        ),
        _bars(
            shown.breakdown(VIEWS),
            methods,
            "By how many right answers there are",
            "Recall@1 by the number of other images of the query's building.",
        ),
    ]
    return (
        f"<section><h2>Where it works, and where it does not</h2>"
        f'<p class="sub">All on the {shown.split} split. Whiskers are intervals from resampling buildings; the small '
        f"figure under a bar is its number of queries.</p>{legend(methods, chance=True)}"
        f'<div class="grid">{"".join(cards)}</div></section>'
    )


def _bars(breakdown: Breakdown, methods: Sequence[str], title: str, note: str) -> str:
    if not breakdown.bins:
        return _card(title, note, f'<div class="empty">Not shown: {escape(breakdown.note)}.</div>')
    groups = [f"{entry.label}\n{entry.queries:,}" for entry in breakdown.bins]
    bars = [
        svg.Bars(method, METHOD_NAMES[method], [entry.scores.get(method) for entry in breakdown.bins])
        for method in methods
    ]
    if breakdown.unknown:
        note += f" {breakdown.unknown:,} queries are not in it: nothing is recorded for them."
    return _card(title, note, svg.bar_chart(groups, bars, [entry.chance for entry in breakdown.bins], title))


def _card(title: str, note: str, body: str) -> str:
    return f'<div class="card"><h3>{title}</h3><p class="note">{note}</p>{body}</div>'


def training_section(checkpoint: Checkpoint) -> str:
    """The curves of the training run."""
    curves = training_curves(checkpoint.history)
    cards = [
        _card(
            chart.title,
            chart.note + _line_names(chart.lines),
            svg.line_chart(chart.lines, chart.title, shares=chart.shares, x_label="epoch"),
        )
        for chart in curves
    ]
    body = f'<div class="grid">{"".join(cards)}</div>'
    if not cards:
        body = '<div class="empty">The checkpoint carries no training history.</div>'
    return (
        f'<section><h2>Training</h2><p class="sub">The history that the checkpoint carries; its weights are those '
        f"after epoch {checkpoint.epoch}.</p>{body}</section>"
    )


def _line_names(lines: Sequence[svg.Line]) -> str:
    spans = "".join(f'<span class="{line.css}"><i>{escape(line.label)}</i></span>' for line in lines)
    return f'<span class="legend lines">{spans}</span>'


def map_section(pictures: Pictures) -> str:
    """Both spaces laid out in the plane, the same buildings in the same colours."""
    found = pictures.space_map
    head = "<section><h2>Map of the space</h2>"
    if found is None:
        return f'{head}<div class="empty">Too few images of buildings with two or more for a map.</div></section>'
    numbers, counts = _counted(found.labels.tolist())
    coloured = {building: place for place, building in enumerate(numbers[:_MAP_COLOURS])}
    cards = []
    for method, positions in found.positions.items():
        # Coloured marks are drawn last, so that grey ones do not cover them.
        order = sorted(range(len(positions)), key=lambda place: int(found.labels[place]) in coloured)
        points = []
        for place in order:
            building = int(found.labels[place])
            css = f"p c{coloured[building]}" if building in coloured else ""
            x, y = positions[place].tolist()
            points.append((x, y, css, str(building), pictures.building_of[building]))
        chart = svg.scatter(points, f"map of the {METHOD_NAMES[method]} space")
        cards.append(f'<div class="card"><h3>{METHOD_NAMES[method]}</h3><div class="map">{chart}</div></div>')
    return (
        f'{head}<p class="sub">{len(found.rows):,} of {found.images:,} images of the {pictures.gallery.split} split, '
        f"laid out by t-SNE from each space on its own. The {len(coloured)} buildings with the most images "
        f"({counts[0]} each at most) are coloured alike in both; hover over a mark to find its building in the other. "
        f"Closeness is meaningful in a map like this, distances and empty areas are not.</p>"
        f'<div class="grid">{"".join(cards)}</div></section>'
    )


def _counted(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers by how often they occur, most frequent first, and how often."""
    counts: dict[int, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    numbers = sorted(counts, key=lambda label: (-counts[label], label))
    return numbers, [counts[label] for label in numbers]
