"""A study for people: one HTML page that needs no network, and its history as one picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from spatial_core.evaluation import svg
from spatial_core.retrieval.bootstrap import Estimate

# In the page's colours; only the points of single trials are new.
_STYLE = (
    "<style>svg .points .curve,svg .backbone .dot{display:none}svg .faint .curve{stroke-width:1;stroke-opacity:.5}"
    "</style>"
)
_PICTURE_STYLE = (
    "svg{background:#fff;font-family:system-ui,sans-serif}text{font-size:12px;fill:#171a1f}.faint{fill:#626a75}"
    ".rule{stroke:#e4e5e1}.axis{stroke:#626a75;stroke-opacity:.55}.curve{fill:none;stroke:currentColor;stroke-width:2.2}"
    ".points .curve{display:none}.dot{fill:#fff;stroke:currentColor;stroke-width:1.6}"
    ".projector{color:#2a5bd7}.backbone{color:#e08a1e}.random{color:#a3a9b2}.backbone .dot{display:none}"
)
_NAMES = {"projector points": "trial run to its end", "random points": "trial ended early", "backbone": "best so far"}
# Beside `study.json`.
PAGE = "study.html"
_TABLE_ROWS = 15
_CURVES = 60


def render_page(record: Mapping[str, Any]) -> str:
    """The page of a study; the same bytes for the same record."""
    sections = [_STYLE, _header(record), _search(record), _importances(record), _table(record)]
    template = files("spatial_core.evaluation").joinpath("page.html").read_text(encoding="utf-8")
    content = "\n".join([*sections, _footer(record)])
    return template.replace("<title>Retrieval report</title>", "<title>Tuning study</title>").replace(
        "<!--content-->", content
    )


def history_picture(record: Mapping[str, Any]) -> str:
    """The history of the search as an SVG file that stands on its own; empty without a trial that has a value."""
    chart = _history_chart(record)
    opening, separator, rest = chart.partition(">")
    if not separator:
        return ""
    return f'{opening} xmlns="http://www.w3.org/2000/svg" width="840"><style>{_PICTURE_STYLE}</style>{rest}'


def best_trials(record: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Completed trials, best first."""
    complete = [trial for trial in record["trials"] if trial["state"] == "complete"]
    return sorted(complete, key=lambda trial: (-trial["value"], trial["number"]))[:count]


def shown_value(value: Any) -> str:
    """A hyper-parameter as it is shown: four significant digits, words as they are."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _header(record: Mapping[str, Any]) -> str:
    states: dict[str, int] = {}
    for trial in record["trials"]:
        states[trial["state"]] = states.get(trial["state"], 0) + 1
    facts = [("study", record["study"]), *((state, f"{count:,}") for state, count in sorted(states.items()))]
    evaluation, best = record["evaluation"], record["best"]
    if evaluation["queries"] is not None:
        facts += [("queries", f"{evaluation['queries']:,}"), ("images searched", f"{evaluation['images']:,}")]
    shown = "".join(f'<span class="fact">{escape(name)} <b>{escape(str(value))}</b></span>' for name, value in facts)
    if best is None:
        title, lede = "No trial was completed yet", "Training uses the hyper-parameters of its settings until one is."
    else:
        title = f"The best of {len(record['trials'])} trials reaches {svg.percent(best['value'])} {record['metric']}"
        lede = (
            f"Trial {best['number']}, after epoch {best['best_epoch']} of {best['epochs']}. Every trial is measured on "
            f"the same queries of the validation split, which chooses among them: expect less on the test split."
        )
    return (
        f'<header><div class="eyebrow">Tuning study</div><h1>{escape(title)}</h1>'
        f'<p class="lede">{escape(lede)}</p><div class="facts">{shown}</div></header>'
    )


def _history_chart(record: Mapping[str, Any]) -> str:
    valued = [trial for trial in record["trials"] if trial["value"] is not None]
    lines = []
    for css, state in (("random points", "pruned"), ("projector points", "complete")):
        points = [(float(trial["number"]), trial["value"]) for trial in valued if trial["state"] == state]
        if points:
            lines.append(svg.Line(css, _NAMES[css], points))
    best: list[tuple[float, float]] = []
    for trial in valued:
        if trial["state"] == "complete" and (not best or trial["value"] > best[-1][1]):
            if best:
                best.append((float(trial["number"]), best[-1][1]))
            best.append((float(trial["number"]), trial["value"]))
    if best:
        best.append((float(valued[-1]["number"]), best[-1][1]))
        lines.insert(0, svg.Line("backbone", _NAMES["backbone"], best))
    return svg.line_chart(lines, "objective by trial", x_label="trial")


def _search(record: Mapping[str, Any]) -> str:
    names = "".join(f'<span class="{css}"><i>{name}</i></span>' for css, name in _NAMES.items())
    metric = escape(record["metric"])
    cards = [
        ("By trial", f"Best validation {metric}; a trial that was ended early stands where it was ended.",
         f'{_history_chart(record)}<div class="legend lines">{names}</div>'),
        ("By epoch", f"Validation {metric} of each trial, the best one in colour; hover over a mark for its trial.",
         _curves(record)),
    ]  # fmt: skip
    body = "".join(_card(f'<h3>{title}</h3><p class="note">{note}</p>{chart}') for title, note, chart in cards)
    return _section("The search", "", f'<div class="grid">{body}</div>')


def _curves(record: Mapping[str, Any]) -> str:
    best = record["best"]["number"] if record["best"] else None
    lines = []
    for trial in record["trials"][-_CURVES:] + [t for t in record["trials"][:-_CURVES] if t["number"] == best]:
        points = sorted((float(epoch), value) for epoch, value in trial["intermediate_values"].items())
        css = "projector" if trial["number"] == best else "random faint"
        if points:
            lines.append(svg.Line(css, f"trial {trial['number']}, {trial['state']}", points))
    lines.sort(key=lambda line: line.css == "projector")
    return svg.line_chart(lines, "objective by epoch", x_label="epoch")


def _importances(record: Mapping[str, Any]) -> str:
    found = record["importances"]
    if not found:
        body = '<div class="empty">Not shown: too few completed trials to tell importance from chance.</div>'
    else:
        rows = "".join(
            f"<tr><td>{escape(name)}</td>"
            f'<td style="width:60%">{svg.interval_strip([("projector", name, Estimate(share))], name)}</td>'
            f"<td>{svg.percent(share, 0)}</td></tr>"
            for name, share in found.items()
        )
        body = _card(f"<table>{rows}</table>")
    note = "Share of each hyper-parameter in what sets good trials apart (PED-ANOVA)."
    return _section("What mattered", note, body)


def _table(record: Mapping[str, Any]) -> str:
    trials = best_trials(record, _TABLE_ROWS)
    if not trials:
        return ""
    names = list(trials[0]["parameters"])
    head = "".join(f"<th>{escape(name)}</th>" for name in ["trial", record["metric"], "epoch", *names])
    rows = "".join(
        "<tr>"
        + f"<td>{trial['number']}</td><td>{svg.percent(trial['value'])}</td><td>{trial['best_epoch']}</td>"
        + "".join(f"<td>{escape(shown_value(trial['parameters'][name]))}</td>" for name in names)
        + "</tr>"
        for trial in trials
    )
    body = f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _section("The best trials", "", body)


def _section(title: str, note: str, body: str) -> str:
    sub = f'<p class="sub">{note}</p>' if note else ""
    return f"<section><h2>{title}</h2>{sub}{body}</section>"


def _card(body: str) -> str:
    return f'<div class="card">{body}</div>'


def _footer(record: Mapping[str, Any]) -> str:
    provenance = record["provenance"]
    shown: Sequence[tuple[str, Any]] = [("inputs", provenance["inputs"]), ("space", record["space"])]
    rows = "".join(
        f"<tr><td>{name}</td><td><code>{escape(json.dumps(value, sort_keys=True))}</code></td></tr>"
        for name, value in [*shown, ("settings", provenance["config"])]
    )
    return f"<footer><table>{rows}</table></footer>"
