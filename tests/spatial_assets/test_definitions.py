"""The code location as a whole: what it is made of, what it costs to load, what every asset says of itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

import spatial_assets
import spatial_core
from spatial_assets.definitions import defs
from spatial_assets.instigators import LOCATION, REPOSITORY
from spatial_core.jobs.registry import STAGES
from spatial_core.lake.catalogue import CATALOGUE

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).parent / "snapshots" / "asset_graph.json"
HEAVY = (
    "torch", "transformers", "mlflow", "optuna", "sklearn", "pandas", "matplotlib", "plotly", "faiss", "scipy",
    "dagster_slurm",
)  # fmt: skip


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    return defs()


@pytest.fixture(scope="module")
def specs(definitions: dg.Definitions) -> dict[str, dg.AssetSpec]:
    return {spec.key.to_user_string(): spec for spec in definitions.resolve_all_asset_specs()}


def graph_record(definitions: dg.Definitions) -> dict[str, Any]:
    """The asset graph as plain data."""
    graph = definitions.resolve_asset_graph()
    record: dict[str, Any] = {}
    for key in sorted(graph.get_all_asset_keys(), key=dg.AssetKey.to_user_string):
        node = graph.get(key)
        assets_def = node.assets_def
        record[key.to_user_string()] = {
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "partitions": node.partitions_def.name if node.partitions_def is not None else None,
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "executable": node.is_executable,
            "pools": sorted(node.pools or ()),
            "automation": node.automation_condition.get_label() if node.automation_condition else None,
            "backfill": assets_def.backfill_policy.max_partitions_per_run if assets_def.backfill_policy else None,
            "checks": sorted(
                f"{check.name}{' (blocking)' if graph.get(check).blocking else ''}" for check in node.check_keys
            ),
        }
    return record


def test_the_asset_graph_is_the_one_agreed_on(definitions: dg.Definitions) -> None:
    """After an intended change: SPATIAL_UPDATE_SNAPSHOTS=1 pytest tests/spatial_assets/test_definitions.py"""
    record = graph_record(definitions)
    if os.environ.get("SPATIAL_UPDATE_SNAPSHOTS"):
        SNAPSHOT.parent.mkdir(exist_ok=True)
        SNAPSHOT.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    assert record == json.loads(SNAPSHOT.read_text())


def test_definitions_are_loadable(definitions: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(definitions)


def test_assets_and_catalogue_name_the_same_things(specs: dict[str, dg.AssetSpec]) -> None:
    assert set(specs) == set(CATALOGUE)
    for name, kind in CATALOGUE.items():
        deps = {dep.asset_key.to_user_string() for dep in specs[name].deps}
        assert set(kind.upstream) <= deps, f"{name} lacks a dependency that its artifact has"
        partitions = specs[name].partitions_def
        assert (partitions.name if partitions is not None else None) == kind.partition


@pytest.mark.parametrize("name", list(CATALOGUE))
def test_every_asset_says_what_it_is(specs: dict[str, dg.AssetSpec], name: str) -> None:
    spec = specs[name]
    assert spec.group_name in {"street_view", "projector", "publishing", "operations"}
    assert spec.kinds
    assert spec.owners
    assert spec.description is not None
    for topic in ("Source:", "Licence:", "Grain:"):
        assert topic in spec.description, f"{name} does not state its {topic.lower()}"
    if CATALOGUE[name].stage:
        assert spec.code_version == STAGES[CATALOGUE[name].stage].code_version
        if CATALOGUE[name].on_demand:
            assert spec.automation_condition is None, f"{name} is made when a person asks for it"
        else:
            assert spec.automation_condition is not None and spec.automation_condition.get_label()


@pytest.mark.parametrize(
    "name", [name for name in CATALOGUE if name not in {"projector_checkpoint", "retrieval_report", "hf_model"}]
)
def test_tabular_assets_describe_every_column(specs: dict[str, dg.AssetSpec], name: str) -> None:
    schema = specs[name].metadata["dagster/column_schema"]
    assert isinstance(schema, dg.TableSchema)
    assert schema.columns
    assert all(column.description for column in schema.columns)


def test_every_artifact_is_checked(definitions: dg.Definitions) -> None:
    """Single artifacts by a blocking check; partitions when they are made, and by a standing check on the whole."""
    graph = definitions.resolve_asset_graph()
    for name, kind in CATALOGUE.items():
        if not kind.stage:
            continue
        checks = graph.get(dg.AssetKey(name)).check_keys
        if kind.partition is None:
            assert any(graph.get(check).blocking for check in checks), name
        else:
            assert "partitions_complete" in {check.name for check in checks}, name
    coverage = [check.name for check in graph.get(dg.AssetKey("raw_tars")).check_keys]
    assert coverage == ["coverage"]


def test_sensors_and_schedules_run_from_the_first_start(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    sensors = {sensor.name: sensor for sensor in repository.sensor_defs}
    assert set(sensors) == {"raw_tars_sensor", "packaged_images_sensor", "automation", "cluster_jobs", "lost_runs"}
    assert {sensor.default_status for sensor in sensors.values()} == {dg.DefaultSensorStatus.RUNNING}
    assert {schedule.default_status for schedule in repository.schedule_defs} == {dg.DefaultScheduleStatus.RUNNING}


def test_loading_imports_nothing_heavy_and_reads_no_settings(tmp_path: Path) -> None:
    """In a process of its own, with a settings file that would fail if anybody read it."""
    broken = tmp_path / "config.toml"
    broken.write_text("not toml")
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from spatial_assets.definitions import defs\n"
        "defs().get_repository_def()\n"
        "print(round(time.perf_counter() - start, 2), 's')\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {found}' if found else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "SPATIAL_CONFIG": str(broken)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sys.stdout.write(f"definitions loaded in {done.stdout}")


def test_no_asset_knows_where_it_runs() -> None:
    folder = Path(spatial_assets.__file__).parent / "defs"
    modules = [path for path in folder.rglob("*.py") if path.name != "resources.py"]
    assert len(modules) > 12
    for path in modules:
        text = path.read_text().lower()
        for word in ("slurm", "subprocess", "popen", "in_process", "isolation", "sbatch", "multiprocess"):
            assert word not in text, f"{path.name} mentions {word}"


@pytest.mark.parametrize(
    "package",
    ["street_view", "metric_learning", "evaluation", "publishing", "inference", "backbones", "retrieval", "images"],
)
def test_no_stage_knows_where_it_runs(package: str) -> None:
    """Neither that there is a scheduler, nor that somebody else asks."""
    modules = list((Path(spatial_core.__file__).parent / package).rglob("*.py"))
    assert modules
    for path in modules:
        text = path.read_text().lower()
        for word in ("slurm", "sbatch", "dagster", "pipes_"):
            assert word not in text, f"{path.name} mentions {word}"


def test_workspace_names_the_location_whose_cursors_we_keep() -> None:
    (entry,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert entry["python_module"]["location_name"] == LOCATION
    assert entry["python_module"]["module_name"] == "spatial_assets.definitions"
    assert defs().get_repository_def().name == REPOSITORY


def test_the_instance_applies_its_limits(tmp_path: Path) -> None:
    """Pools are limited from the first use on, without a command typed before."""
    (tmp_path / "dagster.yaml").write_text((ROOT / "dagster_home" / "dagster.yaml").read_text())
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        config = instance.get_concurrency_config()
        assert config.pool_config.default_pool_limit == 1
        assert config.run_queue_config.max_concurrent_runs == 3
        storage = instance.event_log_storage
        for pool in ("cpu", "gpu"):
            storage.initialize_concurrency_limit_to_default(pool)
            assert storage.claim_concurrency_slot(pool, "run-1", "step").is_claimed
            assert not storage.claim_concurrency_slot(pool, "run-2", "step").is_claimed
        assert instance.run_monitoring_enabled
        assert instance.run_retries_enabled and not instance.run_retries_max_retries > 1
        assert not instance.telemetry_enabled


def test_pools_of_the_assets_are_the_documented_ones(definitions: dg.Definitions) -> None:
    record = graph_record(definitions)
    used = {pool for entry in record.values() for pool in entry["pools"]}
    documented = re.search(r"pools in use: (.*)", (ROOT / "dagster_home" / "dagster.yaml").read_text())
    assert documented is not None
    assert used == set(documented.group(1).split(", "))
    for name, entry in record.items():
        # What takes a moment needs no pool, and must not wait for one that a run holds for hours.
        assert len(entry["pools"]) == (1 if CATALOGUE[name].stage and entry["group"] != "operations" else 0), name
