"""The report as one HTML file: style, script, charts and pictures inside, nothing fetched.

Every text that comes from data is escaped. The same evaluation gives the same bytes: there is no date in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from spatial_core.evaluation import svg
from spatial_core.evaluation.measure import Evaluation, Pictures
from spatial_core.evaluation.page_charts import COMPARED, breakdown_section, legend, map_section, training_section
from spatial_core.evaluation.page_gallery import gallery_section
from spatial_core.evaluation.results import CHANCE, METRICS, SplitResult
from spatial_core.evaluation.spaces import BACKBONE, METHODS, PCA, PROJECTOR
from spatial_core.evaluation.wording import METHOD_NAMES, metric_gain, metric_interval, metric_value
from spatial_core.retrieval.bootstrap import Estimate

_TILES = ("recall@1", "recall@5", "recall@10", "mAP", "MRR")


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
        "" if shown is None else breakdown_section(shown),
        training_section(evaluation.checkpoint),
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
            f"<b>{svg.percent(raw.value)}</b> on the same queries; {verdict(shown.gains['recall@1'])}."
        )
    return f'<header>{eyebrow}<h1>{title}</h1><p class="lede">{lede}</p>{_facts(facts)}</header>'


def verdict(gain: Estimate) -> str:
    """What the paired difference to raw features says; a gain or loss only where the interval excludes zero."""
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
            for method in COMPARED
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
    names = legend(
        [method for method in COMPARED if method in shown.scores],
        note=f"small figures and whiskers: {100 * confidence:g} % intervals, resampling buildings",
    )
    return f'{names}<div class="tiles">{"".join(tiles)}</div>'


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


def _look(pictures: Pictures) -> list[str]:
    return [map_section(pictures), gallery_section(pictures.gallery, pictures.thumbnails)]


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
