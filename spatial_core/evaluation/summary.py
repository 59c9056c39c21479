"""The report at a glance, for places that show no HTML page: one picture and one markdown table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spatial_core.evaluation.measure import Evaluation
from spatial_core.evaluation.results import METRICS, SplitResult
from spatial_core.evaluation.spaces import BACKBONE, PCA, PROJECTOR
from spatial_core.evaluation.wording import METHOD_NAMES, metric_interval, metric_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SHOWN = ("recall@1", "recall@5", "recall@10")
_COLOURS = {BACKBONE: "#e08a1e", PCA: "#2f9e83", PROJECTOR: "#2a5bd7"}
_INK, _MUTED, _RULE = "#171a1f", "#626a75", "#e4e5e1"


def draw_summary(path: Path, shown: SplitResult | None, confidence: float) -> None:
    """Recall@1, 5 and 10 of raw features, PCA and projector as a PNG; the same bytes for the same numbers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 4.2), dpi=120, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if shown is None:
        axes.text(0.5, 0.5, "not enough buildings to measure", ha="center", transform=axes.transAxes, color=_MUTED)
    else:
        _draw_bars(axes, shown)
        title = f"Same-building retrieval, {shown.split} split: {shown.query_buildings:,} held-out buildings"
        axes.set_title(title, loc="left", fontsize=12, color=_INK, pad=28)
        text = f"% of {shown.queries:,} queries, {100 * confidence:g} % intervals by building"
        axes.text(0, 1.03, text, transform=axes.transAxes, fontsize=9.5, color=_MUTED)
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=10)
    axes.set_xticks(range(len(_SHOWN)), _SHOWN, fontsize=11)
    axes.set_xlim(-0.5, len(_SHOWN) - 0.5)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"], color=_MUTED)
    axes.grid(axis="y", color=_RULE, zorder=0)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    # The Software entry would name the matplotlib release in bytes that do not depend on it otherwise.
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_bars(axes: Axes, shown: SplitResult) -> None:
    methods = [method for method in _COLOURS if method in shown.scores]
    width = 0.8 / len(methods)
    for number, method in enumerate(methods):
        for place, metric in enumerate(_SHOWN):
            found = shown.scores[method][metric]
            if found is None:
                continue
            x = place + (number - (len(methods) - 1) / 2) * width
            label = METHOD_NAMES[method] if place == 0 else None
            axes.bar(x, found.value, width * 0.9, color=_COLOURS[method], label=label, zorder=2)
            top = found.value
            if found.low is not None and found.high is not None:
                spread = [[max(0.0, found.value - found.low)], [max(0.0, found.high - found.value)]]
                axes.errorbar(x, found.value, spread, color=_INK, capsize=3, linewidth=1.1, zorder=3)
                top = found.high
            axes.text(x, top + 0.015, f"{100 * found.value:.0f}", ha="center", va="bottom", fontsize=10, color=_INK)


def summary_markdown(evaluation: Evaluation, confidence: float) -> str:
    """One table a split, a line a method."""
    parts = []
    for split in evaluation.splits:
        parts.append(f"### {split.split}\n")
        if split.note:
            parts.append(f"{split.note}\n")
            continue
        parts.append(
            f"{split.queries:,} queries of {split.query_buildings:,} buildings among {split.images:,} images; in "
            f"brackets {100 * confidence:g} % intervals from resampling buildings.\n"
        )
        metrics = [metric for metric in METRICS if any(scores[metric] for scores in split.scores.values())]
        parts.append(f"| method | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}")
        for method, scores in split.scores.items():
            cells = []
            for metric in metrics:
                found = scores[metric]
                interval = "" if found is None else metric_interval(metric, found)
                value = "" if found is None else metric_value(metric, found.value)
                cells.append(f"{value} ({interval})" if interval else value)
            parts.append(f"| {METHOD_NAMES[method]} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)
