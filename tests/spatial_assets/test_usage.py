"""`cluster_usage` in Dagster: made on this machine whatever the profile, with table, chart and page."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import dagster as dg

from spatial_assets.compute.accounting import job_metadata
from spatial_assets.compute.base import Work
from spatial_assets.compute.choose import choose_runner
from spatial_assets.compute.local import ChildProcess, InProcess
from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_core.cluster.ending import Ending, usage_record
from spatial_core.cluster.following import Done
from spatial_core.config.compute import ComputeSection
from spatial_core.jobs.registry import StageCall

TASK = Ending(
    "7_1", "COMPLETED", elapsed_s=3600, cpu_s=3000.0, cores_s=7200, memory_mb=512.0, memory_asked_mb=4096.0, gpus=2,
    node="node1", partition="gpu", start="2026-01-01T00:00:00", end="2026-01-01T01:00:00",
)  # fmt: skip


def test_it_is_made_here_on_a_cluster_profile_too(lake, instance) -> None:
    """No scheduler's command exists here: anything that was submitted would fail."""
    lake.write(compute={"profile": "slurm_login", "isolation": "in_process"})
    jobs = lake.settings.jobs_dir
    jobs.mkdir(parents=True)
    record = usage_record(TASK, "backbone_embeddings", "0001", {}, (2.0, 0.0))
    (jobs / "usage.jsonl").write_text(json.dumps(record) + "\nbroken\n")
    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance, asset_selection=[dg.AssetKey("cluster_usage")]
    )
    assert result.success
    (made,) = result.asset_materializations_for_node("cluster_usage")
    shown = {name: value.value for name, value in made.metadata.items()}
    assert shown["gpu_hours"] == 2.0 and shown["cost"] == 4.0 and shown["core_hours"] == 2.0
    assert shown["dagster/row_count"] == 1
    assert "| not a record of a job's end | 1 |" in shown["rejected"]
    assert "| backbone_embeddings | 1 | - | 2.00 | 2.00 | 42% | 0.5 GiB | 4.0 GiB | 4.00 |" in shown["by_asset"]
    kind, data = shown["chart"].partition("(")[2].rstrip(")").split(";base64,")
    assert kind == "data:image/svg+xml"
    assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")  # noqa: S314 - drawn a moment ago
    assert lake.settings.locations.cluster_usage_path.with_suffix(".html").as_uri() == shown["page_url"]
    (verdict,) = result.get_asset_check_evaluations()
    assert verdict.passed and verdict.check_name == "usage_sound"


def test_nothing_but_the_profile_and_the_asset_decide_where_work_is_done(lake) -> None:
    lake.write(compute={"profile": "slurm_login", "local_assets": ["hf_model"]})
    settings = lake.settings
    there = {
        asset: type(choose_runner(Work(asset, {"": StageCall("any", {}, settings)})))
        for asset in ("merged_splits", "hf_model", "cluster_usage")
    }
    assert there["hf_model"] is there["cluster_usage"] is ChildProcess
    assert there["merged_splits"] not in {ChildProcess, InProcess}


def test_metadata_adds_up_the_attempts_of_a_job() -> None:
    compute = ComputeSection(cost_per_gpu_hour=2.0)
    once = job_metadata("backbone_embeddings", Done("0001", ending=TASK), compute)
    assert "job_attempts" not in once
    twice = job_metadata("backbone_embeddings", Done("0001", ending=replace(TASK, earlier=(TASK,))), compute)
    assert twice["job_attempts"] == 2
    for name in ("job_cost", "job_gpu_s", "job_core_s", "job_cpu_s"):
        assert twice[name] == 2 * once[name] > 0
