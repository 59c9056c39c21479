"""A backfill of many partitions as one job array: what fails is named, and costs nothing else."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from spatial_assets.definitions import definitions_with
from spatial_assets.defs.resources import SettingsResource
from spatial_assets.partitions import RANGE_TAGS
from spatial_core.cluster.ledger import Ledger
from tests.data.make_tars import street_view, tar_bytes
from tests.slurm.client import Slurm
from tests.slurm.lakes import REPOSITORY, ClusterLake

KEYS = [f"{number:04d}" for number in range(1, 201)]
DAMAGED = {"0050", "0117"}
CRASHED = "0163"


@pytest.mark.slow
def test_200_partitions_with_two_failures_and_one_crash(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    lake = ClusterLake(tmp_path / "config.toml", slurm)
    # The task file holds these lines too, which the bracket keeps from matching themselves.
    here = f'grep -q "{CRASHED}[.]tar" "tasks/$SLURM_ARRAY_TASK_ID.json"'
    crash = f"if {here}; then echo planned crash; kill -SEGV $$; fi"
    lake.write(setup=[f"export PYTHONPATH={REPOSITORY}", crash], resources={"intermediates": {"mem": "300M"}})
    raw = lake.settings.locations.raw_dir
    raw.mkdir(parents=True)
    for key in KEYS:
        (raw / f"{key}.tar").write_bytes(tar_bytes(street_view(int(key), 7, targets=1)))
    for key in DAMAGED:
        (raw / f"{key}.tar").write_bytes((raw / f"{key}.tar").read_bytes()[:700])

    definitions = definitions_with(settings=SettingsResource(config_file=str(lake.config)))
    with dg.instance_for_test() as instance:
        instance.add_dynamic_partitions("tar", KEYS)
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=[dg.AssetKey("intermediates")],
            tags=dict(zip(RANGE_TAGS, (KEYS[0], KEYS[-1]), strict=True)),
            raise_on_error=False,
        )
        made = instance.get_materialized_partitions(dg.AssetKey("intermediates"))
        run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert not result.success
    assert made == set(KEYS) - DAMAGED - {CRASHED}
    (event,) = [event for event in result.all_events if event.is_step_failure]
    failure = event.step_failure_data.user_failure_data
    assert failure is not None
    assert str(failure.description).startswith("3 of 200 partitions failed (")
    assert all(f"{key}: TarError: " in str(failure.description) for key in DAMAGED)
    assert f"{CRASHED}: JobFailed: " in str(failure.description)
    assert "planned crash" in str(failure.description)
    assert len(run.tags["cluster_job/intermediates"].split(",")) == 1, "one run is one array"
    assert Ledger(lake.settings.jobs_dir).submissions() == []
    assert slurm.jobs() == []
