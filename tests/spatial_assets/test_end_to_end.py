"""Sensor, automation, materialization, vectors: real files, real stages, tick by tick."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

TAR_ASSETS = ["backbone_embeddings", "fingerprints", "intermediates"]
CHAIN = ["difficulty_metadata", "hf_model", "merged_splits", "projector_checkpoint", "retrieval_report"]
DROP_ASSETS = ["building_embeddings", "final_embeddings"]
QUIET = [{}, {}]


def copy(source: Path, target: Path) -> None:
    """As a careful copy does: under a dotted name, then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target.with_name(f".{target.name}.part"))
    target.with_name(f".{target.name}.part").rename(target)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.parquet")}


@pytest.mark.slow
def test_a_lake_follows_its_inputs(daemon, lake, city: Path, instance: dg.DagsterInstance) -> None:
    lake.write_small()
    at = lake.settings.locations
    assert daemon.sense() == {"raw_tars_sensor": [], "packaged_images_sensor": []}
    assert daemon.decide() == {}

    # Two tars and a drop arrive together; the drop has no model to wait with but waits.
    for name in ("0901.tar", "0902.tar"):
        copy(city / "raw" / name, lake.raw / name)
    copy(city / "drops" / "new_images.parquet", lake.drops / "march.parquet")
    daemon.sense()
    assert daemon.decide() == {}, "nothing is whole at first sight"
    assert daemon.sense() == {"raw_tars_sensor": ["0901", "0902"], "packaged_images_sensor": ["march"]}
    requested = daemon.decide()
    assert requested == {asset: ["0901", "0902"] for asset in TAR_ASSETS}
    daemon.execute(requested)

    # What is made from all tars follows in one run.
    requested = daemon.decide()
    assert sorted(requested) == CHAIN
    daemon.execute(requested)

    # The drop gets its vectors now that there is a model.
    requested = daemon.decide()
    assert requested == {asset: ["march"] for asset in DROP_ASSETS}
    daemon.execute(requested)
    assert [daemon.decide() for _ in QUIET] == QUIET
    check_vectors(at.final_embeddings_dir / "march", lake.drops / "march.parquet")
    buildings = pq.read_table(at.building_embeddings_dir / "march.parquet")
    assert buildings.num_rows == len(set(buildings["OSMID"].to_pylist())) > 0

    # A third tar: its own artifacts and what lies downstream, nothing else.
    before = stamps(at.intermediates_dir) | stamps(at.fingerprints_dir) | stamps(at.embeddings_dir)
    copy(city / "raw" / "0903.tar", lake.raw / "0903.tar")
    daemon.sense(), daemon.sense()
    requested = daemon.decide()
    assert requested == {asset: ["0903"] for asset in TAR_ASSETS}
    daemon.execute(requested)
    after = stamps(at.intermediates_dir) | stamps(at.fingerprints_dir) | stamps(at.embeddings_dir)
    assert before.items() <= after.items()
    requested = daemon.decide()
    assert sorted(requested) == CHAIN
    daemon.execute(requested)
    requested = daemon.decide()
    assert requested == {asset: ["march"] for asset in DROP_ASSETS}, "a new model embeds the drop again"
    daemon.execute(requested)
    assert [daemon.decide() for _ in QUIET] == QUIET

    # The third tar is replaced by other pictures under the same name.
    rows = pq.read_metadata(at.intermediates_dir / "0903.parquet").num_rows
    replace_tar(lake.raw / "0903.tar", city / "raw" / "0903.tar")
    daemon.sense(), daemon.sense()
    requested = daemon.decide()
    assert requested == {asset: ["0903"] for asset in TAR_ASSETS}
    daemon.execute(requested)
    assert 0 < pq.read_metadata(at.intermediates_dir / "0903.parquet").num_rows < rows

    # Replaced again, by the very same bytes: one look at its own artifacts, and nothing further.
    requested = daemon.decide()
    assert sorted(requested) == CHAIN
    daemon.execute(requested)
    daemon.execute(daemon.decide())
    assert [daemon.decide() for _ in QUIET] == QUIET
    before = stamps(at.intermediates_dir) | stamps(at.fingerprints_dir) | stamps(at.embeddings_dir)
    copy(lake.raw / "0903.tar", lake.raw / "0903.tar")
    daemon.sense(), daemon.sense()
    requested = daemon.decide()
    assert requested == {asset: ["0903"] for asset in TAR_ASSETS}
    daemon.execute(requested)
    assert stamps(at.intermediates_dir) | stamps(at.fingerprints_dir) | stamps(at.embeddings_dir) == before
    assert [daemon.decide() for _ in QUIET] == QUIET

    # Deleting a raw tar loses nothing.
    held = stamps(at.intermediates_dir)
    (lake.raw / "0901.tar").unlink()
    daemon.sense(), daemon.sense()
    assert "0901" in instance.get_dynamic_partitions("tar")
    assert stamps(at.intermediates_dir) == held
    assert all(keys != ["0901"] for keys in daemon.decide().values())

    # Every materialization said what it is.
    for asset in [*TAR_ASSETS, *CHAIN, *DROP_ASSETS]:
        event = instance.get_latest_materialization_event(dg.AssetKey(asset))
        assert event is not None and event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        for name in ("dagster/uri", "sha256", "config_digest", "elapsed_s", "read", "rejected", "up_to_date"):
            assert name in metadata, f"{asset} reports no {name}"
        assert "dagster/row_count" in metadata or "dagster/partition_row_count" in metadata, asset
        if asset != "retrieval_report":
            assert metadata["dagster/column_schema"].schema.columns, asset
    report = instance.get_latest_materialization_event(dg.AssetKey("retrieval_report"))
    assert report is not None and report.asset_materialization is not None
    shown = report.asset_materialization.metadata
    assert "data:image/png;base64," in shown["picture"].value
    assert "| method |" in shown["metrics"].value
    assert Path(shown["page_file"].value).is_file()
    assert shown["page"].value == "http://127.0.0.1:3001/"


def check_vectors(dataset: Path, drop: Path) -> None:
    table = ds.dataset(dataset / "parts", format="parquet").to_table()
    vectors = np.stack(table["embedding"].to_numpy())
    assert vectors.shape[1] == 256
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    given = pq.read_table(drop, columns=["OSMID", "is_valid"])
    valid = [osmid for osmid, ok in zip(given["OSMID"].to_pylist(), given["is_valid"].to_pylist(), strict=True) if ok]
    assert sorted(table["OSMID"].to_pylist()) == sorted(valid)
    assert table.schema.field("OSMID").type == given.schema.field("OSMID").type


def replace_tar(target: Path, source: Path) -> None:
    """The same tar with a picture less, under the same name."""
    import tarfile

    part = target.with_name(f".{target.name}.part")
    with tarfile.open(source) as old, tarfile.open(part, "w") as new:
        members = [member for member in old.getmembers() if member.isfile()]
        stem = Path(members[-1].name).stem
        for member in members:
            if Path(member.name).stem != stem:
                new.addfile(member, old.extractfile(member))
    os.utime(part)
    part.rename(target)
