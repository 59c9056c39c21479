"""One tick of a sensor over a watched folder: registers partitions and reports what lies there. It requests no runs.

The observation itself is `spatial_core.storage.watch.scan`; here its outcome becomes partition requests, events of the
external asset, log lines and the cursor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from spatial_assets.metadata import DATA_VERSION_TAG
from spatial_assets.partitions import KEY_PATTERNS
from spatial_core.config.settings import ResolvedPaths, Settings
from spatial_core.errors import ArtifactError, InputError
from spatial_core.storage.watch import Found, Rules, Scan, WatchState, scan

TICK_SECONDS = 15
# Each reported file is an event of its own, and the daemon writes about 15 of them a second to SQLite on a busy disk
# (1 000 took 72 s): more at a time would keep it from its other sensors.
REPORTS_A_TICK = 250


@dataclass(frozen=True)
class Watched:
    """A watched folder.

    Args:
        asset: the external asset whose partitions the files are.
        partitions: where keys are registered.
        suffix: `.tar` or `.parquet`.
        folder: resolved paths -> the folder.
        pattern: settings -> regular expression for whole file names.
    """

    asset: str
    partitions: dg.DynamicPartitionsDefinition
    suffix: str
    folder: Callable[[ResolvedPaths], Path]
    pattern: Callable[[Settings], str]

    def tick(self, context: dg.SensorEvaluationContext, settings: Settings) -> dg.SensorResult | dg.SkipReason:
        """Observe the folder once and say what follows from it."""
        folder = self.folder(settings.locations)
        state = self._remembered(context)
        if not folder.is_dir():
            if state.known or state.gone:
                return dg.SkipReason(
                    f"{folder} is missing although {len(state.known)} files were registered from it; is it mounted? "
                    "Nothing is concluded about them"
                )
            folder.mkdir(parents=True, exist_ok=True)
        name = str(self.partitions.name)
        rules = Rules(self.suffix, self.pattern(settings), KEY_PATTERNS[name])
        try:
            seen = scan(folder, rules, state, budget_s=settings.watch.budget_s, limit=REPORTS_A_TICK)
        except InputError as error:
            return dg.SkipReason(f"{error}; nothing is concluded about its files")
        self._log(context, state, seen)
        whole = [*seen.new, *seen.changed, *seen.back]
        return dg.SensorResult(
            skip_reason=None if whole else dg.SkipReason(_summary(seen)),
            dynamic_partitions_requests=[self.partitions.build_add_request([found.key for found in whole])]
            if whole
            else [],
            asset_events=self._events(context, folder, state, seen),
            cursor=seen.state.to_json(),
        )

    def _remembered(self, context: dg.SensorEvaluationContext) -> WatchState:
        try:
            return WatchState.from_json(context.cursor)
        except ArtifactError as error:
            context.log.warning(
                f"{error}; starting from an empty state: files are looked at again over two ticks, "
                "and those reported before in the same form are not reported again"
            )
            return WatchState()

    def _events(
        self, context: dg.SensorEvaluationContext, folder: Path, before: WatchState, seen: Scan
    ) -> list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation]:
        events: list[dg.AssetMaterialization | dg.AssetObservation | dg.AssetCheckEvaluation] = [
            dg.AssetMaterialization(
                self.asset,
                partition=found.key,
                description=f"{found.name} {_change(before, found) if found in seen.changed else 'arrived whole'}",
                metadata={
                    "path": dg.MetadataValue.path(folder / found.name),
                    "dagster/uri": (folder / found.name).as_uri(),
                    "bytes": found.bytes,
                    "mtime_ns": dg.MetadataValue.text(str(found.mtime_ns)),
                },
                tags={DATA_VERSION_TAG: found.version},
            )
            for found in (*seen.new, *seen.changed)
            if not self._reported(context, found)
        ]
        events += [
            dg.AssetObservation(
                self.asset,
                partition=name.removesuffix(self.suffix),
                description=_gone_text(name),
                metadata={"state": "gone", "path": dg.MetadataValue.path(folder / name)},
            )
            for name in seen.gone
        ]
        return events

    def _reported(self, context: dg.SensorEvaluationContext, found: Found) -> bool:
        """Whether the newest event of the key already names this very content, as after a lost cursor."""
        newest = context.instance.fetch_materializations(
            dg.AssetRecordsFilter(asset_key=dg.AssetKey(self.asset), asset_partitions=[found.key]), limit=1
        ).records
        if not newest or newest[0].asset_materialization is None:
            return False
        return (newest[0].asset_materialization.tags or {}).get(DATA_VERSION_TAG) == found.version

    def _log(self, context: dg.SensorEvaluationContext, before: WatchState, seen: Scan) -> None:
        for name, fault in seen.unfit.items():
            context.log.warning(f"{_shown(name)} is not registered: it {fault}")
        for found in seen.changed:
            context.log.info(
                f"{found.name} {_change(before, found)} ({found.bytes:,} bytes): what is made from it is redone where "
                "its content differs"
            )
        for found in seen.back:
            context.log.info(f"{found.name} is back unchanged")
        for name in seen.gone:
            context.log.warning(_gone_text(name))
        if not seen.complete:
            context.log.info(f"enough for one tick; the next one continues at {_shown(seen.state.resume)}")


def _summary(seen: Scan) -> str:
    parts = [f"{len(seen.state.known)} files known"]
    if seen.pending:
        parts.append(f"{len(seen.pending)} still arriving ({', '.join(map(_shown, seen.pending[:5]))})")
    if seen.state.gone:
        parts.append(f"{len(seen.state.gone)} removed since")
    if seen.state.unfit:
        parts.append(f"{len(seen.state.unfit)} with unfit names ({', '.join(map(_shown, seen.state.unfit[:5]))})")
    return ", ".join(parts)


def _change(before: WatchState, found: Found) -> str:
    """What a stat tells of a known file that is whole again: the same size may be the same content."""
    size, _ = before.known.get(found.name) or before.gone[found.name]
    return "was written again in the same size" if size == found.bytes else "was replaced"


def _gone_text(name: str) -> str:
    return f"{name} was removed from the folder; its partition and everything made from it stay"


def _shown(name: str) -> str:
    """A file name as text that any log can hold: names may be undecodable bytes."""
    return name.encode("utf-8", "backslashreplace").decode()
