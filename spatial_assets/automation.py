"""Named automation conditions. Which asset has which one is written at the asset; why it is so is written here.

The rule of the whole graph: the lake follows its inputs. A new or replaced tar or drop is worked on without a click,
and so is everything downstream of it. Stages are idempotent, so a request too many costs a moment and a request too
few costs a stale result: where a condition has to err, it errs towards asking again.

Two kinds of sub-condition occur, and the difference matters:

* *level*: true as long as something is so (`missing`, `in_progress`). Levels heal: they hold for keys that were there
  before the daemon first looked.
* *edge*: true on the one tick at which something happened (`newly_updated`, `newly_true`). Edges tell a new event from
  an old one, so they do not repeat a request for ever; `since` keeps an edge until it is acted upon.

A failed partition is not asked for again until something it is made from changes: retrying a damaged tar every half
minute helps nobody. A person may materialize it again at any time.
"""

from __future__ import annotations

import dagster as dg

_If = dg.AutomationCondition

never_made = (
    _If.missing()
    .newly_true()
    .since((_If.newly_requested() | _If.newly_updated()).with_label("asked for or made"))
    .with_label("never made nor asked for")
)
"""Edge on a level. On the very first evaluation everything missing is newly true, so keys that were registered before
the daemon ran for the first time are asked for too (`eager()` leaves them out). After a request it stays false whether
that failed, was cancelled or succeeded, so a cancelled run is not started again behind the person's back."""

inputs_changed = (
    _If.any_deps_updated()
    .since(_If.newly_requested().with_label("asked for"))
    .with_label("inputs changed since last asked for")
)
"""Edge. Only a request clears it, never the mere end of a run: an input that changes while a run is already reading the
old one would otherwise be forgotten. An input updated by the same run as the asset itself does not count."""

idle = (~_If.in_progress()).with_label("not being made")
"""Level. Nothing is asked for twice at a time; `exclusive()` in the library would refuse the second writer anyway."""

inputs_there = (~_If.any_deps_missing() & ~_If.any_deps_in_progress()).with_label("inputs made and settled")
"""Level. Every input of this very key exists (or is made by the same run) and nothing is about to replace it."""

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

checked = _If.all_deps_blocking_checks_passed()
"""Level. Inside one run a failed blocking check stops what follows; this holds it back in other runs too."""

per_key = ((never_made | inputs_changed) & idle & inputs_there).with_label("per_key")
"""Of one tar or one drop: when its key appears, when its raw file is replaced, when its input was made again."""

from_all_keys = ((never_made | inputs_changed) & idle & some_input_there).with_label("from_all_keys")
"""Of all tars together: once, after the last of the running ones."""

after_inputs = ((never_made | inputs_changed) & idle & inputs_there & checked).with_label("after_inputs")
"""The chain of single artifacts (training, report, model): in the same run as what they follow where possible."""


def per_key_with_model(drop: str, model: str) -> dg.AutomationCondition[dg.AssetKey]:
    """Vectors of a drop: when the drop appears or is replaced, and again when the model's content changes.

    A drop that arrives before the first model waits for it (`never_made` holds on until then). While a new model is
    being trained, a drop is embedded with the one there is, rather than waiting for hours; it is asked for again when
    the new one is published. A model published again with the same bytes has the same data version and asks for
    nothing.
    """
    own = dg.AssetSelection.assets(drop)
    drop_changed = (
        _If.any_deps_updated()
        .allow(own)
        .since(_If.newly_requested().with_label("asked for"))
        .with_label("drop replaced since last asked for")
    )
    model_changed = (
        _If.asset_matches(model, _If.data_version_changed())
        .since(_If.newly_requested().with_label("asked for"))
        .with_label("model changed since last asked for")
    )
    ready = (~_If.any_deps_missing() & ~_If.any_deps_in_progress().allow(own)).with_label("drop and model there")
    return ((never_made | drop_changed | model_changed) & idle & ready & checked).with_label("per_key_with_model")
