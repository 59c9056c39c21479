"""Materializes every asset in one go, on a real instance, through the same definitions, sensors and asset bodies that
the daemon uses: partitions are registered by evaluating the sensors, and runs are ordinary Dagster runs, so that the UI
shows afterwards what happened and the daemon finds its sensors' cursors where it would have left them.

What this adds to `dagster dev` is only impatience: it waits for no tick and runs everything in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import dagster as dg

from spatial_assets.compute.base import Outcome, Work
from spatial_assets.compute.local import InProcess
from spatial_assets.defs.resources import ComputeResource, SettingsResource
from spatial_assets.instigators import remember_cursor, remembered_cursor
from spatial_assets.lost_runs import end_lost_runs
from spatial_assets.partitions import RANGE_TAGS
from spatial_core.errors import ArtifactBusy, InputError, StageFailed
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.report import Report
from spatial_core.storage.watch import WatchState

WATCHING_SENSORS = ("raw_tars_sensor", "packaged_images_sensor")
LOCATION_TAGS = {".dagster/repository": "__repository__@spatial_assets"}
_MAX_TICKS = 5
# Events go to the instance all the same; on the terminal they would bury what the caller shows.
_QUIET_CONSOLE = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


@dataclass(frozen=True)
class DriveEvent:
    """Something to show.

    `registered`: the sensor named in `asset` registered the keys in `message`. `started`, `progress`, `waiting`,
    `finished`, `failed`: one artifact; `finished` carries the stage's report, `waiting` and `failed` the cause in
    `message`; after `waiting` it is started again.
    """

    kind: Literal["registered", "started", "progress", "waiting", "finished", "failed"]
    asset: str
    partition: str = ""
    message: str = ""
    done: int = 0
    total: int | None = None
    report: Report | None = None


@dataclass(frozen=True)
class AssetOutcome:
    """One artifact: rows in it, seconds spent (0 when it was up to date), and the stage's report."""

    asset: str
    partition: str
    rows: int
    seconds: float
    up_to_date: bool
    report: Report


OnEvent = Callable[[DriveEvent], None]


def ignore(event: DriveEvent) -> None:
    """An `OnEvent` that shows nothing."""


def drive(
    settings_path: Path | None,
    instance: dg.DagsterInstance,
    on_event: OnEvent = ignore,
    *,
    settle_s: float = 1.0,
) -> list[AssetOutcome]:
    """Register what lies in the watched folders and materialize every asset but those made on demand.

    Stages find finished artifacts by themselves, so a second call does no work twice.

    Args:
        settings_path: TOML file, or None as for the command line.
        instance: where partitions, events and cursors are kept.
        on_event: called from this thread as things happen.
        settle_s: seconds between two looks at a folder; a file that changes meanwhile is not whole.

    Raises:
        InputError: if no tar is there.
        StageFailed: if a run failed; the message is the first cause.
    """
    return _Drive(settings_path, instance, on_event, settle_s).run()


class _ObservedCompute:
    """Takes the place of the compute resource: tells what stages do, and runs those of this machine in this process."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self.outcomes: list[AssetOutcome] = []
        self.causes: list[str] = []

    def run_all(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        local = work.calls and next(iter(work.calls.values())).settings.compute.profile == "local"
        for outcome in self._in_turn(context, work) if local else ComputeResource().run_all(context, work):
            self._tell(work.asset, outcome)
            yield outcome

    def _in_turn(self, context: dg.AssetExecutionContext, work: Work) -> Iterator[Outcome]:
        """In this process, so that every step of progress can be shown."""
        for key, call in work.calls.items():
            self._on_event(DriveEvent("started", work.asset, key))

            def progress(done: int, total: int | None, message: str, key: str = key) -> None:
                self._on_event(DriveEvent("progress", work.asset, key, message, done, total))

            yield from InProcess(also=progress).run_all(context, Work(work.asset, {key: call}))

    def _tell(self, asset: str, outcome: Outcome) -> None:
        key, report = outcome.key, outcome.report
        if report is None:
            cause = " ".join(str(outcome.error).split())
            if isinstance(outcome.error, ArtifactBusy):
                self._on_event(DriveEvent("waiting", asset, key, cause))
                return
            self.causes.append(f"{asset} {key}: {cause}" if key else f"{asset}: {cause}")
            self._on_event(DriveEvent("failed", asset, key, cause))
            return
        self.outcomes.append(AssetOutcome(asset, key, report.rows, report.seconds, report.up_to_date, report))
        self._on_event(DriveEvent("finished", asset, key, report=report))


class _Drive:
    """One call of `drive`."""

    def __init__(
        self, settings_path: Path | None, instance: dg.DagsterInstance, on_event: OnEvent, settle_s: float
    ) -> None:
        # Imported here, because the code location loads every asset module.
        from spatial_assets.definitions import definitions_with

        self.instance = instance
        self.on_event = on_event
        self.settle_s = settle_s
        self.compute = _ObservedCompute(on_event)
        self.settings_resource = SettingsResource(config_file="" if settings_path is None else str(settings_path))
        self.settings = self.settings_resource.load()
        self.definitions = definitions_with(settings=self.settings_resource, compute=self.compute)
        self.tags = LOCATION_TAGS

    def run(self) -> list[AssetOutcome]:
        # A driver that was killed left a run in progress, which keeps its pools.
        end_lost_runs(self.instance)
        for name in WATCHING_SENSORS:
            self._register(name)
        if not self.instance.get_dynamic_partitions("tar"):
            raise InputError(f"{self.settings.locations.raw_dir}: no whole tar there; `spatial demo-data` writes some")
        for assets, partition in self._plan():
            for keys in self._ranges(partition):
                self._materialize(assets, keys)
        checks = self.definitions.resolve_job_def("standing_checks")
        checks.execute_in_process(
            instance=self.instance, tags=self.tags, run_config=_QUIET_CONSOLE, raise_on_error=False
        )
        return self.compute.outcomes

    def _register(self, name: str) -> None:
        """Tick a sensor until nothing is arriving any more, applying each result as the daemon does."""
        sensor = self.definitions.resolve_sensor_def(name)
        for tick in range(_MAX_TICKS):
            if tick:
                time.sleep(self.settle_s)
            before = remembered_cursor(self.instance, name)
            context = dg.build_sensor_context(
                instance=self.instance, cursor=before, resources={"settings": self.settings_resource}
            )
            result = sensor(context)
            if isinstance(result, dg.SkipReason):
                raise InputError(str(result.skip_message))
            if not isinstance(result, dg.SensorResult):
                raise StageFailed(f"sensor {name} returned {type(result).__name__}")
            for event in result.asset_events:
                self.instance.report_runless_asset_event(event)
            for request in result.dynamic_partitions_requests or ():
                self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
                self.on_event(DriveEvent("registered", name, message=", ".join(request.partition_keys)))
            remember_cursor(self.instance, sensor, result.cursor)
            state = WatchState.from_json(result.cursor)
            if not (state.pending or state.resume):
                return

    def _plan(self) -> Iterator[tuple[list[dg.AssetKey], str | None]]:
        """Assets in the order of the graph, neighbours of one partitioning together: each group can share a run."""
        group: list[dg.AssetKey] = []
        partition: str | None = None
        for key in self.definitions.resolve_asset_graph().toposorted_asset_keys:
            kind = CATALOGUE[key.to_user_string()]
            if not kind.stage or kind.on_demand:
                continue
            if group and kind.partition != partition:
                yield group, partition
                group = []
            group.append(key)
            partition = kind.partition
        if group:
            yield group, partition

    def _ranges(self, partition: str | None) -> Iterator[list[str]]:
        """Registered keys, in order, whose raw file is there, as unbroken ranges; no keys for single assets."""
        if partition is None:
            yield []
            return
        source = next(kind for kind in CATALOGUE.values() if kind.partition == partition and not kind.stage)
        keys: list[str] = []
        for key in self.instance.get_dynamic_partitions(partition):
            if source.path(self.settings.locations, key).is_file():
                keys.append(key)
            elif keys:
                yield keys
                keys = []
        if keys:
            yield keys

    def _materialize(self, assets: list[dg.AssetKey], keys: list[str]) -> None:
        tags = self.tags | (dict(zip(RANGE_TAGS, (keys[0], keys[-1]), strict=True)) if keys else {})
        result = self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=self.instance,
            asset_selection=assets,
            tags=tags,
            run_config=_QUIET_CONSOLE,
            raise_on_error=False,
        )
        if result.success:
            return
        causes = self.compute.causes or [_cause(event) for event in result.all_events if event.is_step_failure]
        raise StageFailed(causes[0] if causes else f"run {result.run_id} failed")


def _cause(event: dg.DagsterEvent) -> str:
    """Why a step failed, in one line: what the asset said, else the innermost error."""
    data = event.step_failure_data
    said = data.user_failure_data.description if data.user_failure_data else None
    error = data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return f"{event.step_key}: {said or ' '.join(str(error.message if error else 'no cause recorded').split())}"
