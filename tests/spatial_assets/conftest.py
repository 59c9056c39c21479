"""A lake in a temporary folder, an ephemeral instance, and the daemon's loop one tick at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_core.config.settings import Settings, load_settings
from spatial_core.jobs.registry import StageCall, run_stage

SENSORS = ("raw_tars_sensor", "packaged_images_sensor")
RANGE_TAGS = ("dagster/asset_partition_range_start", "dagster/asset_partition_range_end")
SMALL: dict[str, dict[str, Any]] = {
    "compute": {"isolation": "in_process"},
    "demo": {"tars": 3, "buildings_per_tar": 10, "image_size_px": 64, "drop_images": 6, "max_views": 3},
    "data": {"neighbors": 8, "k0_for_local_scale": 3, "pca_components": 8},
    "training": {"num_epochs": 2, "batch_size": 16, "retrieval_metric_top_k": [1, 5]},
    "training_model": {"hidden_dim": 16, "output_dim": 256},
    "evaluation": {"bootstrap_samples": 20, "gallery_queries": 2, "map_points": 50},
}


@dataclass
class Lake:
    """A settings file and the folders it names."""

    config: Path

    def write_small(self, **more: dict[str, Any]) -> None:
        """Write settings under which the whole chain takes seconds, and further sections."""
        self.write(**SMALL, **more)

    def write(self, **sections: dict[str, Any]) -> None:
        """Write the settings file."""
        lines = ['[paths]\ndata_dir = "data"']
        for name, values in sections.items():
            lines.append(f"[{name}]")
            for key, value in values.items():
                lines.append(f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}")
        self.config.write_text("\n".join(lines) + "\n")

    @property
    def settings(self) -> Settings:
        return load_settings(self.config, environ={})

    @property
    def raw(self) -> Path:
        return self.settings.locations.raw_dir

    @property
    def drops(self) -> Path:
        return self.settings.locations.drops_dir


@dataclass
class Daemon:
    """What the Dagster daemon does, when told to: tick sensors, evaluate conditions, keep cursors."""

    definitions: dg.Definitions
    instance: dg.DagsterInstance
    settings: SettingsResource
    cursors: dict[str, str | None] = field(default_factory=dict)
    automation_cursor: Any = None
    skipped: dict[str, str] = field(default_factory=dict)

    def sense(self, *names: str) -> dict[str, list[str]]:
        """Tick sensors once, apply their results; returns the keys each registered."""
        registered = {}
        for name in names or SENSORS:
            context = dg.build_sensor_context(
                instance=self.instance, cursor=self.cursors.get(name), resources={"settings": self.settings}
            )
            result = self.definitions.resolve_sensor_def(name)(context)
            if isinstance(result, dg.SkipReason):
                self.skipped[name] = str(result.skip_message)
                registered[name] = []
                continue
            assert isinstance(result, dg.SensorResult)
            self.skipped[name] = str(result.skip_reason.skip_message) if result.skip_reason else ""
            for event in result.asset_events:
                self.instance.report_runless_asset_event(event)
            keys: list[str] = []
            for request in result.dynamic_partitions_requests or ():
                self.instance.add_dynamic_partitions(request.partitions_def_name, list(request.partition_keys))
                keys += request.partition_keys
            self.cursors[name] = result.cursor
            registered[name] = keys
        return registered

    def decide(self) -> dict[str, list[str]]:
        """Evaluate all automation conditions; returns requested asset -> partition keys ([""] when unpartitioned)."""
        result = dg.evaluate_automation_conditions(
            defs=self.definitions, instance=self.instance, cursor=self.automation_cursor
        )
        self.automation_cursor = result.cursor
        requested: dict[str, list[str]] = {}
        for key in self.definitions.resolve_asset_graph().get_all_asset_keys():
            if result.get_num_requested(key):
                partitions = result.get_requested_partitions(key)
                requested[key.to_user_string()] = sorted(partition or "" for partition in partitions)
        return requested

    def execute(self, requested: dict[str, list[str]]) -> None:
        """Run requests for real, as the daemon would group them: assets over the same keys share a run."""
        groups: dict[tuple[str, ...], list[dg.AssetKey]] = {}
        for asset, keys in requested.items():
            groups.setdefault(tuple(keys), []).append(dg.AssetKey(asset))
        for keys, assets in groups.items():
            tags = dict(zip(RANGE_TAGS, (keys[0], keys[-1]), strict=True)) if len(keys) > 1 else None
            result = self.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=self.instance,
                asset_selection=assets,
                tags=tags,
                partition_key=keys[0] if len(keys) == 1 and keys[0] else None,
            )
            assert result.success

    def made(self, asset: str, *keys: str) -> None:
        """Report materializations as if somebody had made them by hand."""
        for key in keys or (None,):
            self.instance.report_runless_asset_event(dg.AssetMaterialization(asset, partition=key))

    def start(self, assets: list[str], keys: list[str] | None = None) -> dg.DagsterRun:
        """A run of some assets over neighbouring keys, planned and started but with nothing done yet."""
        selection = frozenset(dg.AssetKey(asset) for asset in assets)
        tags = dict(zip(RANGE_TAGS, (keys[0], keys[-1]), strict=True)) if keys else {}
        job = self.definitions.resolve_implicit_global_asset_job_def()
        run = self.instance.create_run_for_job(
            job_def=job.get_subset(asset_selection=set(selection)), asset_selection=selection, tags=tags
        )
        self.instance.handle_run_event(run.run_id, _run_event(dg.DagsterEventType.RUN_START, run))
        return run

    def finish(self, run: dg.DagsterRun, made: dict[str, list[str]], *, failed: bool = False) -> None:
        """End a run, having made some keys of some assets ([""] for the single artifact)."""
        for asset, keys in made.items():
            for key in keys:
                event = dg.AssetMaterialization(asset, partition=key or None)
                self.instance.report_dagster_event(_materialization(run, event), run.run_id)
        if failed:
            self.instance.report_run_failed(run, "as planned")
        else:
            self.instance.handle_run_event(run.run_id, _run_event(dg.DagsterEventType.RUN_SUCCESS, run))


def _run_event(kind: dg.DagsterEventType, run: dg.DagsterRun) -> Any:
    from dagster._core.events import DagsterEvent

    return DagsterEvent(event_type_value=kind.value, job_name=run.job_name)


def _materialization(run: dg.DagsterRun, event: dg.AssetMaterialization) -> Any:
    from dagster._core.events import DagsterEvent, StepMaterializationData

    return DagsterEvent(
        event_type_value=dg.DagsterEventType.ASSET_MATERIALIZATION.value,
        job_name=run.job_name,
        step_key=event.asset_key.to_user_string(),
        event_specific_data=StepMaterializationData(event),
    )


@pytest.fixture(scope="session")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small procedural city: `raw/0901.tar` to `0903.tar` and `drops/new_images.parquet`."""
    folder = tmp_path_factory.mktemp("city")
    settings = Settings(demo=SMALL["demo"], base_dir=folder)  # type: ignore[arg-type]
    run_stage(StageCall("demo-data", {"output_dir": str(folder)}, settings))
    return folder


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    made = Lake(tmp_path / "config.toml")
    made.write()
    return made


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def daemon(lake: Lake, instance: dg.DagsterInstance) -> Daemon:
    settings = SettingsResource(config_file=str(lake.config))
    return Daemon(definitions_with(settings=settings), instance, settings)
