"""A tuning study on the cluster: its workers are one job array that shares the database beside Dagster."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from urllib.parse import urlsplit

import dagster as dg
import pytest

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_core.tuning.secrets import read_secret
from tests.data.make_training_lake import build_lake
from tests.slurm.client import Slurm
from tests.slurm.lakes import ClusterLake

TUNING = """
[tuning]
trials = 4
workers = 2
max_epochs = 30
metric = "recall@1"
heartbeat_s = 1
grace_s = 3
space = {hidden_dim = [12, 20], batch_size = [8], ucb_warmup_samples = [50]}
"""


@pytest.fixture
def lake(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterLake:
    """Splits and difficulty, and settings of a short study of two workers."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    made = build_lake(tmp_path / "made")
    lake = ClusterLake(tmp_path / "config.toml", slurm)
    lake.write()
    paths = f'data_dir = "data"\nmerged_dir = "{made.merged}"\ndifficulty_metadata_path = "{made.difficulty}"'
    lake.config.write_text(lake.config.read_text().replace('data_dir = "data"', paths) + TUNING)
    return lake


@pytest.mark.slow
def test_workers_are_one_job_array_and_a_cancelled_one_is_made_up_for(slurm: Slurm, lake: ClusterLake) -> None:
    folder = lake.settings.locations.tuning_dir
    seen: dict[str, str] = {}

    def cancel_one() -> None:
        """As soon as a trial is under way, its worker is cancelled; what the cluster knows of the jobs is kept."""
        slurm.wait_for(lambda: list((folder / "trials").glob("*/training_state.safetensors")), 120, what="a trial")
        (array,) = {job.partition("_")[0] for job in slurm.jobs()}
        files = [path for path in lake.settings.jobs_dir.rglob("*") if path.is_file()]
        seen["files"] = "\n".join(path.read_text(errors="replace") for path in files)
        seen["jobs"] = slurm.run("scontrol", "show", "job", array)
        seen["script"] = slurm.run("scontrol", "write", "batch_script", f"{array}_0", "-")
        seen["array"] = array
        slurm.cancel(f"{array}_0")

    watcher = threading.Thread(target=cancel_one)
    watcher.start()
    with dg.instance_for_test() as instance:
        definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey("tuning_study")]
        )
        watcher.join()
        assert result.success
        events = "\n".join(str(entry) for entry in instance.all_logs(result.run_id))
    record = json.loads((folder / "study.json").read_text())
    states = [trial["state"] for trial in record["trials"]]
    assert states.count("complete") == 4
    assert len(record["trials"]) <= 5
    assert {trial["worker"] for trial in record["trials"]} <= {"00", "01"}
    tasks = {row.id for row in slurm.accounted(seen["array"]) if "." not in row.id}
    assert tasks == {f"{seen['array']}_0", f"{seen['array']}_1"}

    password = str(urlsplit(read_secret(folder / "storage.url")).password)
    assert "spatial_core.jobs" in seen["script"]
    assert "storage.url" in seen["files"], "the calls of the workers name the file"
    accounting = slurm.run("sacct", "-j", seen["array"], "--format=ALL", "-P")
    assert password not in events + seen["files"] + seen["jobs"] + seen["script"] + accounting
    data = lake.settings.locations.data_dir
    holders = [path for path in data.rglob("*") if path.is_file() and password.encode() in path.read_bytes()]
    assert holders == [folder / "storage.url"]
    assert slurm.jobs() == []
