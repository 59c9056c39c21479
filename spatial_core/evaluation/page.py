"""The report as one HTML file: style, script, charts and pictures inside, nothing fetched.

Every text that comes from data is escaped. The same evaluation gives the same bytes: there is no date in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from spatial_core.evaluation import svg
from spatial_core.evaluation.bands import PAIRS, RECALL
from spatial_core.evaluation.breakdowns import ANGLE, DISTANCE, VIEWS
from spatial_core.evaluation.history import training_curves
from spatial_core.evaluation.measure import Evaluation, Pictures
from spatial_core.evaluation.page_gallery import gallery_section
from spatial_core.evaluation.results import CHANCE, METRICS, Breakdown, SplitResult
from spatial_core.evaluation.spaces import BACKBONE, METHODS, PCA, PROJECTOR
from spatial_core.evaluation.wording import METHOD_NAMES, metric_gain, metric_interval, metric_value
from spatial_core.retrieval.bootstrap import Estimate

_TILES = ("recall@1", "recall@5", "recall@10", "mAP", "MRR")
_COMPARED = (PROJECTOR, BACKBONE, PCA)
_MAP_COLOURS = 12


def render_page(evaluation: Evaluation, provenance: Mapping[str, Any], confidence: float) -> str:
    """The whole page.

    Args:
        evaluation: what was measured.
        provenance: the report's provenance, as JSON.
        confidence: level of the intervals.
    """
    shown = evaluation.shown
    sections = [
        _header(evaluation, shown),
        "" if shown is None else _tiles(shown, confidence),
        _tables(evaluation, confidence),
        "" if shown is None else _breakdowns(shown),
        _training(evaluation),
        *([] if evaluation.pictures is None else _look(evaluation.pictures)),
        _how(evaluation, confidence),
        _footer(provenance),
    ]
    template = files("spatial_core.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    return template.replace("<!--content-->", "\n".join(section for section in sections if section))


def _header(evaluation: Evaluation, shown: SplitResult | None) -> str:
    config = evaluation.checkpoint.config
    facts = (
        [("backbone", _model_name(evaluation.checkpoint.backbone.model))]
        if evaluation.checkpoint.backbone.model
        else []
    )
    facts += [
        ("dimensions", f"{config.input_dim} \N{RIGHTWARDS ARROW} {config.output_dim}"),
        ("parameters of the head", f"{evaluation.checkpoint.projector.parameter_count:,}"),
        ("epoch", str(evaluation.checkpoint.epoch)),
    ]
    eyebrow = '<div class="eyebrow">Retrieval report</div>'
    if shown is None:
        notes = "".join(f"<p><b>{split.split}</b>: {escape(split.note)}</p>" for split in evaluation.splits)
        title = "<h1>Nothing could be measured yet</h1>"
        return f'<header>{eyebrow}{title}<div class="lede">{notes}</div>{_facts(facts)}</header>'
    found = shown.scores[PROJECTOR]["recall@1"]
    raw = shown.scores[BACKBONE]["recall@1"]
    facts = [
        ("queries", f"{shown.queries:,}"),
        ("held-out buildings", f"{shown.query_buildings:,}"),
        ("images searched", f"{shown.images:,}"),
        *facts,
    ]
    if found is None or raw is None:
        title = "Too few images to tell one method from another"
        lede = (
            f"The {shown.split} split has {shown.images} images: a ranking of so few finds the building in any order."
        )
    else:
        title = f"The nearest image shows the same building {svg.percent(found.value)} of the time"
        lede = (
            f"On the {shown.split} split, whose buildings the projector never saw. Raw backbone features reach "
            f"<b>{svg.percent(raw.value)}</b> on the same queries; {_verdict(shown.gains['recall@1'])}."
        )
    return f'<header>{eyebrow}<h1>{title}</h1><p class="lede">{lede}</p>{_facts(facts)}</header>'


def _verdict(gain: Estimate) -> str:
    points = f"<b>{100 * gain.value:+.1f} points</b>"
    if gain.low is None or gain.high is None:
        return f"the difference is {points}, from a single building"
    interval = f"({100 * gain.low:+.1f} to {100 * gain.high:+.1f})"
    if gain.low > 0:
        return f"the projector gains {points} {interval}"
    if gain.high < 0:
        return f"the projector loses against them: {points} {interval}"
    return f"the difference of {points} {interval} may be chance"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    shown = "".join(f'<span class="fact">{escape(name)} <b>{escape(value)}</b></span>' for name, value in facts)
    return f'<div class="facts">{shown}</div>'


def _tiles(shown: SplitResult, confidence: float) -> str:
    tiles = []
    for metric in _TILES:
        found = shown.scores[PROJECTOR][metric]
        if found is None:
            continue
        strips = [
            (method, METHOD_NAMES[method], estimate)
            for method in _COMPARED
            if method in shown.scores and (estimate := shown.scores[method][metric]) is not None
        ]
        gain = shown.gains[metric]
        direction = "up" if (gain.low or 0) > 0 else "down" if (gain.high or 0) < 0 else "flat"
        bounds = metric_interval(metric, found)
        interval = bounds or "one building: no interval"
        tiles.append(
            f'<div class="tile"><div class="name">{metric}</div>'
            f'<div class="number">{metric_value(metric, found.value)}</div>'
            f'<div class="interval">{interval}</div>'
            f"{svg.interval_strip(strips, f'{metric} by method')}"
            f'<div class="gain {direction}">{metric_gain(metric, gain)} over raw</div></div>'
        )
    legend = _legend(
        [method for method in _COMPARED if method in shown.scores],
        note=f"small figures and whiskers: {100 * confidence:g} % intervals, resampling buildings",
    )
    return f'{legend}<div class="tiles">{"".join(tiles)}</div>'


def _legend(methods: Sequence[str], *, chance: bool = False, note: str = "") -> str:
    spans = [f'<span class="{method}"><i>{METHOD_NAMES[method]}</i></span>' for method in methods]
    if chance:
        spans.append('<span class="chance"><i>chance</i></span>')
    if note:
        spans.append(f"<em>{note}</em>")
    return f'<div class="legend">{"".join(spans)}</div>'


def _tables(evaluation: Evaluation, confidence: float) -> str:
    components = None if evaluation.pca is None else evaluation.pca.components.shape[1]
    tables = "".join(_table(split, components) for split in evaluation.splits)
    return (
        "<section><h2>Every method on the same queries</h2>"
        f'<p class="sub">Share of queries with an image of the same building among the k nearest, mean average '
        f"precision and mean reciprocal rank. Small figures are {100 * confidence:g} % intervals from resampling "
        f'buildings.</p><div class="tables">{tables}</div></section>'
    )


def _table(split: SplitResult, components: int | None) -> str:
    title = f"<h3>{split.split.capitalize()} split</h3>"
    if split.note:
        return f'<div class="card">{title}<div class="empty">{escape(split.note)}</div></div>'
    note = (
        f"{split.queries:,} queries of {split.query_buildings:,} buildings, each searched in "
        f"{split.images - 1:,} other images."
    )
    if split.near_training is not None:
        note += (
            f" {svg.percent(split.near_training)} of its buildings stand within 25 m of a training building, where the "
            "same facade may have been seen."
        )
    best = {
        metric: max((found.value for scores in split.scores.values() if (found := scores[metric])), default=None)
        for metric in METRICS
    }
    rows = []
    for method in (*METHODS, CHANCE):
        if method in split.scores:
            cells = [_cell(metric, split.scores[method][metric], best[metric], split.images) for metric in METRICS]
            swatch = f'<span class="{method}"><span class="swatch"></span></span>'
            name = f"PCA to {components}" if method == PCA else METHOD_NAMES[method]
            rows.append(f"<tr><td>{swatch}{name}</td>{''.join(cells)}</tr>")
    gains = []
    for metric in METRICS:
        if metric in split.gains:
            gain = split.gains[metric]
            gains.append(f"<td>{metric_gain(metric, gain)}<small>{metric_interval(metric, gain)}</small></td>")
        else:
            gains.append("<td></td>")
    head = "".join(f"<th>{metric}</th>" for metric in METRICS)
    return (
        f'<div class="card">{title}<p class="note">{note}</p><div class="scroll"><table><tr><th>method</th>{head}</tr>'
        f'{"".join(rows)}<tr class="gains"><td>Projector minus raw</td>{"".join(gains)}</tr></table></div></div>'
    )


def _cell(metric: str, found: Estimate | None, best: float | None, images: int) -> str:
    if found is None:
        return f'<td title="there are only {images - 1} other images: any order reaches them all">\N{EM DASH}</td>'
    css = ' class="best"' if found.value == best else ""
    return f"<td{css}>{metric_value(metric, found.value)}<small>{metric_interval(metric, found)}</small></td>"


def _breakdowns(shown: SplitResult) -> str:
    curves = [
        svg.Line(method, METHOD_NAMES[method], list(zip(shown.curve_k, shown.curves[method], strict=True)))
        for method in (*_COMPARED, CHANCE)
        if method in shown.curves
    ]
    methods = [method for method in _COMPARED if method in shown.scores]
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
        f"figure under a bar is its number of queries.</p>{_legend(methods, chance=True)}"
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


def _training(evaluation: Evaluation) -> str:
    curves = training_curves(evaluation.checkpoint.history)
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
    epoch = evaluation.checkpoint.epoch
    return (
        f'<section><h2>Training</h2><p class="sub">The history that the checkpoint carries; its weights are those '
        f"after epoch {epoch}.</p>{body}</section>"
    )


def _line_names(lines: Sequence[svg.Line]) -> str:
    spans = "".join(f'<span class="{line.css}"><i>{escape(line.label)}</i></span>' for line in lines)
    return f'<span class="legend lines">{spans}</span>'


def _look(pictures: Pictures) -> list[str]:
    return [_maps(pictures), gallery_section(pictures.gallery, pictures.thumbnails)]


def _maps(pictures: Pictures) -> str:
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


def _how(evaluation: Evaluation, confidence: float) -> str:
    pca = evaluation.pca
    components = (
        "Principal components were left out: the training split is empty."
        if pca is None
        else f"<b>PCA</b> keeps {pca.components.shape[1]} components ({svg.percent(pca.explained)} of the variance), "
        f"fitted on {pca.rows:,} training images and on nothing else."
    )
    return (
        '<section><h2>How it was measured</h2><div class="how">'
        "<p><b>Queries</b> are the first images of every building with at least two, in a seeded order, up to the "
        "maximum that the settings give. Each is searched by cosine in all other images of its split.</p>"
        "<p><b>A right answer</b> is any other image of the same facade point. Two facade points may lie on one "
        "physical building, so some wrong answers are not really wrong.</p>"
        "<p><b>Ties go against the model</b>: a wrong image that scores within a millionth of a right one ranks above "
        "it. A space that collapsed to a point scores nothing.</p>"
        f"<p><b>Intervals</b> are {100 * confidence:g} % percentile intervals from resampling whole buildings, because "
        "the images of one succeed and fail together. The difference to raw features is resampled in pairs.</p>"
        f"<p><b>Raw backbone</b> is the pooled features, L2-normalised. {components} <b>Random vectors</b> are unit "
        "vectors of the projector's width; <b>chance</b> is the exact expectation of a random order.</p>"
        "<p><b>A dash</b> stands where k reaches every other image of the split: any order would score 100 %.</p>"
        "<p><b>Difficulty bands</b> come from the difficulty table, hardest (0) to easiest (6). For each query and "
        "band, its own building is searched among its look-alikes of that band that lie in the split.</p>"
        "<p><b>Angles</b> are horizontal, between the directions from the facade point to the query's camera and to "
        "the nearest other camera of the building, from recorded positions.</p>"
        "</div></section>"
    )


def _footer(provenance: Mapping[str, Any]) -> str:
    rows = [("stage", f"{provenance['stage']}, version {provenance['code_version']}")]
    rows += [("settings", str(provenance["config_digest"]))]
    rows += [(f"input: {name}", str(digest)) for name, digest in sorted(provenance["inputs"].items())]
    rows += [(f"model: {name}", str(value)) for name, value in sorted(provenance["model"].items())]
    if provenance["preprocessing"]:
        rows.append(("preprocessing", str(provenance["preprocessing"])))
    body = "".join(f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>" for name, value in rows)
    return (
        "<footer><p>What this report was made from. Digests are SHA-256; the same inputs and settings give the same "
        f"figures again.</p><table>{body}</table></footer>"
    )


def _model_name(model: Mapping[str, str]) -> str:
    return next((model[key] for key in ("id", "model_id", "name", "model") if model.get(key)), "")
