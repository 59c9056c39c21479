"""How methods, metrics and figures are called and written in the page, the picture and the tables."""

from __future__ import annotations

from spatial_core.evaluation.results import CHANCE, MAP, MRR
from spatial_core.evaluation.spaces import BACKBONE, PCA, PROJECTOR, RANDOM
from spatial_core.evaluation.svg import percent
from spatial_core.retrieval.bootstrap import Estimate

METHOD_NAMES = {
    PROJECTOR: "Projector",
    BACKBONE: "Raw backbone",
    PCA: "PCA",
    RANDOM: "Random vectors",
    CHANCE: "Chance (expected)",
}


def metric_value(metric: str, value: float) -> str:
    """Recall as a percentage, mAP and MRR as numbers of three digits."""
    return f"{value:.3f}" if metric in {MAP, MRR} else percent(value)


def metric_interval(metric: str, found: Estimate) -> str:
    """`79.0 to 86.9`, in the unit of `metric_value`; empty without an interval."""
    if found.low is None or found.high is None:
        return ""
    if metric in {MAP, MRR}:
        return f"{found.low:.3f} to {found.high:.3f}"
    return f"{100 * found.low:.1f} to {100 * found.high:.1f}"


def metric_gain(metric: str, found: Estimate) -> str:
    """`+21.3`, in points of a percentage, or `+0.213`."""
    value = found.value + 0.0  # -0.0 becomes 0.0
    return f"{value:+.3f}" if metric in {MAP, MRR} else f"{100 * value:+.1f}"
