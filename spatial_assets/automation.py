"""Named automation conditions. Which asset has which one is written at the asset; why it is so is written here.

The rule of the whole graph: the lake follows its inputs. A new or replaced tar or drop is worked on without a click,
and so is everything downstream of it. Stages are idempotent, so a request too many costs a moment and a request too
few costs a stale result: where a condition has to err, it errs towards asking again.

Two kinds of sub-condition occur, and the difference matters:

* *level*: true as long as something is so (`missing`, `in_progress`). Levels heal: they hold for keys that were there
  before the daemon first looked.
* *edge*: true on the one tick at which something happened (`newly_updated`, `newly_true`). Edges tell a new event from
  an old one, so they do not repeat a request for ever; `since` keeps an edge until it is acted upon.

What was asked for and found unchanged asks for nothing further: the run that found it says so by a tag.

A failed partition is not asked for again until something it is made from changes: retrying a damaged tar every half
minute helps nobody. A person may materialize it again at any time.
"""

from __future__ import annotations

from typing import Any

import dagster as dg

_If = dg.AutomationCondition
_Condition = dg.AutomationCondition[Any]

RAW = dg.AssetSelection.assets("raw_tars", "packaged_images")

_handled = (_If.newly_requested() | _If.newly_updated()).with_label("asked for or made")
_dep_updated = _If.any_deps_match(_If.newly_updated())

never_made = _If.missing().newly_true().since(_handled).with_label("never made nor asked for")
"""Edge on a level. On the very first evaluation everything missing is newly true, so keys that were registered before
the daemon ran for the first time are asked for too (`eager()` leaves them out). After a request it stays false whether
that failed, was cancelled or succeeded, so a cancelled run is not started again behind the person's back."""


def _until_asked_for(edge: _Condition, label: str) -> _Condition:
    """Keep an edge until a request answers it.

    Only a request clears it, never the mere end of a run: an input that changes while a run is already reading the old
    one would otherwise be forgotten. A request is seen one tick after it was made; an edge on that very tick is newer
    than the request, so it is kept.
    """
    return edge.since((_If.newly_requested() & ~edge).with_label("asked for")).with_label(label)


raw_replaced = _until_asked_for(_dep_updated.allow(RAW), "raw file new or replaced since last asked for")
"""Edge. Raw files change on their own, never within a run."""

_made_updated = _dep_updated.ignore(RAW)
input_made_again = (
    _made_updated.since(_If.newly_updated() | (_If.newly_requested() & ~_made_updated)).with_label(
        "input made since last made or asked for"
    )
    | _If.any_deps_match(_If.will_be_requested()).with_label("input asked for now")
).with_label("input made again")
"""Edge. Cleared by the asset's own update too, because one run makes an input and then the asset itself. When that run
fails in between, the input stays newer, and the asset is asked for once more: so the good keys of a range go on.

`any_deps_updated()` would tell updates of the same run apart by itself, but for partitions it compares with the latest
materialized key only, and so asks again for all other keys of a run over a range (Dagster 1.13)."""

inputs_changed = _until_asked_for(_If.any_deps_updated(), "inputs changed since last asked for")
"""Edge, for single artifacts of single artifacts. An input made by the same run does not count."""


def unchanged_tag(asset: str) -> str:
    """Tag of a run that made partitions of an asset; `true` when each came out with the bytes it had before."""
    return f"spatial/unchanged.{asset}"


def content_changed(asset: str) -> _Condition:
    """Edge: keys of an asset were made with other bytes than before.

    Dagster's data versions would say so, but a run over a range of keys has one version for all of them (Dagster 1.13).
    """
    found_unchanged = _If.all_new_updates_have_run_tags(tag_values={unchanged_tag(asset): "true"})
    return _If.asset_matches(asset, _If.newly_updated() & ~found_unchanged).with_label(f"content of {asset} changed")


idle = (~_If.in_progress()).with_label("not being made")
"""Level. Nothing is asked for twice at a time; `exclusive()` in the library would refuse the second writer anyway."""

inputs_there = (~_If.any_deps_missing() & ~_If.any_deps_in_progress()).with_label("inputs made and settled")
"""Level. Every input of this very key exists (or is made by the same run) and nothing is about to replace it."""

ADVICE = dg.AssetSelection.assets("tuning_study")

inputs_but_advice_there = (
    ~_If.any_deps_missing().ignore(ADVICE) & ~_If.any_deps_in_progress().ignore(ADVICE)
).with_label("inputs but advice made and settled")
"""Level. A tuning study is advice, not an input: most lakes have none, and one that is under way takes a day, during
which training goes on with the study, or the settings, that there are."""

some_input_there = (
    _If.any_deps_match((~_If.missing()).with_label("made")).with_label("at least one input made")
    & ~_If.any_deps_match(
        _If.in_progress() | _If.any_deps_match(_If.in_progress()).with_label("what it is made from is in progress")
    ).with_label("any input on its way")
).with_label("inputs settled")
"""Level, for what is made from all tars together. Waiting for *every* key would let one damaged tar block the data set
for ever, and going ahead at every key would train a hundred times during a backfill of a hundred tars. So: as soon as
something is there and nothing upstream is running or queued, with what is there. A tar that failed joins later, when it
is repaired; the standing checks name it."""

not_refused = (~_If.any_deps_match(_If.any_checks_match(_If.check_failed(), blocking_only=True))).with_label(
    "no input failed a blocking check"
)
"""Level. Inside one run a failed blocking check stops what follows; this holds it back in other runs too. It asks for
no failure rather than for a pass: an asset reports its checks together with itself, so a check without a verdict is one
that a cancelled run had planned, and says nothing about the artifact that lies there."""

per_key = ((never_made | raw_replaced | input_made_again) & idle & inputs_there).with_label("per_key")
"""Of one tar or one drop: when its key appears, when its raw file is replaced, when its input was made again."""


def from_all_keys(source: str) -> _Condition:
    """Of all tars together: once, after the last of the running ones, and only when the content of some key changed.

    So a tar that was touched, or replaced by the same bytes, is read once and nothing is merged or trained again.
    """
    source_changed = _until_asked_for(content_changed(source), "content changed since last asked for")
    return ((never_made | source_changed) & idle & some_input_there).with_label("from_all_keys")


after_inputs = ((never_made | inputs_changed) & idle & inputs_there & not_refused).with_label("after_inputs")
"""The chain of single artifacts (training, report, model): in the same run as what they follow where possible."""


after_inputs_with_advice = ((never_made | inputs_changed) & idle & inputs_but_advice_there & not_refused).with_label(
    "after_inputs_with_advice"
)
"""As `after_inputs`, with a tuning study among the inputs: asked for again when a study is made, held up by none."""


def per_key_with_model(drop: str, model: str) -> dg.AutomationCondition[dg.AssetKey]:
    """Vectors of a drop: when the drop appears or is replaced, and again when the model's content changes.

    A drop that arrives before the first model waits for it (`never_made` holds on until then). While a new model is
    being trained, a drop is embedded with the one there is, rather than waiting for hours; it is asked for again when
    the new one is published. A model published again with the same bytes has the same data version and asks for
    nothing.
    """
    own = dg.AssetSelection.assets(drop)
    drop_changed = _until_asked_for(_dep_updated.allow(own), "drop replaced since last asked for")
    model_changed = _until_asked_for(
        _If.asset_matches(model, _If.data_version_changed()), "model changed since last asked for"
    )
    ready = (~_If.any_deps_missing() & ~_If.any_deps_in_progress().allow(own)).with_label("drop and model there")
    return ((never_made | drop_changed | model_changed) & idle & ready & not_refused).with_label("per_key_with_model")
