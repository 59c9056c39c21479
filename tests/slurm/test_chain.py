"""The whole building chain on the cluster gives the artifacts of the local run, digest for digest."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from spatial_assets.drive import drive
from spatial_core.cluster.ledger import Ledger
from tests.slurm.client import Slurm
from tests.slurm.lakes import ClusterLake


@pytest.mark.slow
def test_the_chain_on_the_cluster_gives_the_same_artifacts(
    slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the same place, because the state of a new-data folder names its input."""
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    lake = ClusterLake(tmp_path / "config.toml", slurm)
    lake.write("local")
    lake.draw_city()
    data = lake.settings.locations.data_dir
    with dg.instance_for_test() as instance:
        here = drive(lake.config, instance, settle_s=0.1)
    expected = lake.digests()
    data.rename(tmp_path / "made_here")

    lake.write("slurm_login")
    lake.draw_city()
    with dg.instance_for_test() as instance:
        there = drive(lake.config, instance, settle_s=0.1)
        for asset, key in (("intermediates", "0902"), ("projector_checkpoint", None)):
            filter_ = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[key] if key else None)
            (record,) = instance.fetch_materializations(filter_, limit=1).records
            assert record.asset_materialization is not None
            assert record.asset_materialization.metadata["job_node"].value == "node1"
    assert lake.digests() == expected
    rows = [sorted((made.asset, made.partition, made.rows) for made in outcomes) for outcomes in (here, there)]
    assert rows[0] == rows[1]
    assert Ledger(lake.settings.jobs_dir).submissions() == []
    assert slurm.jobs() == []
