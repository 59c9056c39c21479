"""The whole chain by the commands that the help promises, on made tars and on real ones; every report is checked."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from spatial_core.cli.main import app
from spatial_core.jobs.registry import STAGES
from spatial_core.lake.catalogue import CATALOGUE
from spatial_core.storage.provenance import read_manifest
from tests.data.make_tars import street_view, tar_bytes

KEYS = ("0201", "0202")
MADE = {name for name, kind in CATALOGUE.items() if not kind.on_demand}
SETTINGS = """
[paths]
data_dir = "lake"
[data]
train_ratio = 0.6
val_ratio = 0.2
test_ratio = 0.2
neighbors = 12
k0_for_local_scale = 3
distance_dtype = "float32"
[training]
num_epochs = 2
batch_size = 16
wandb_enabled = false
[evaluation]
bootstrap_samples = 20
gallery_queries = 3
map_points = 40
"""


@dataclass
class Shell:
    """`spatial` with one settings file."""

    folder: Path

    @property
    def lake(self) -> Path:
        return self.folder / "lake"

    def run(self, *arguments: str | Path) -> str:
        """What a command prints on stdout."""
        done = CliRunner().invoke(app, [*map(str, arguments), "--config", str(self.folder / "config.toml")])
        if done.exception is not None:
            raise done.exception
        return done.stdout

    def report(self, *arguments: str | Path) -> dict[str, Any]:
        """The report of a stage; it must account for everything that was read."""
        report: dict[str, Any] = json.loads(self.run(*arguments, "--json"))
        assert report["rows_in"] == report["kept"] + sum(report["rejected"].values())
        assert Path(report["artifact"]).exists()
        manifest = read_manifest(Path(report["artifact"]))
        assert manifest is not None
        assert len(manifest["provenance"]["config_digest"]) == 64, "the settings' digest is in every artifact"
        share = STAGES[report["stage"]].settings
        for name in manifest["provenance"]["config"]:
            known = name in share or name.partition(".")[0] in share
            assert known, f"jobs that differ in {name} would count as the same request"
        return report


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "config.toml").write_text(SETTINGS)
    (tmp_path / "lake" / "raw").mkdir(parents=True)
    return Shell(tmp_path)


def walk_the_chain(shell: Shell) -> None:
    """Every stage twice: the first makes, the second finds."""
    lake = shell.lake
    commands: list[list[str | Path]] = []
    for key in KEYS:
        tar, rows = lake / f"raw/{key}.tar", lake / f"intermediates/{key}.parquet"
        commands += [
            ["ingest", tar, "--output", lake / "intermediates"],
            ["fingerprint", tar, "--intermediates", rows, "--output", lake / "fingerprints"],
            ["embed", tar, "--intermediates", rows, "--output", lake / "embeddings"],
        ]
    best = lake / "checkpoints/checkpoint_best.safetensors"
    table = lake / "difficulty/difficulty_metadata.parquet"
    commands += [
        ["merge", "--embeddings", lake / "embeddings", "--output", lake / "merged"],
        ["difficulty", "--fingerprints", lake / "fingerprints", "--output", table],
        ["train", "--merged", lake / "merged", "--difficulty", table, "--output", lake / "checkpoints"],
        ["evaluate", "--merged", lake / "merged", "--checkpoint", best, "--output", lake / "report"],
        ["publish", "--checkpoint", best, "--output", lake / "model", "--report", lake / "report"],
    ]
    for name, ids in identifiers().items():
        pq.write_table(pa.table({"image_bytes": photographs(lake / "raw/0201.tar"), "OSMID": ids}), drop(lake, name))
        folder, pooled = lake / f"final_embeddings/{name}", lake / f"building_embeddings/{name}.parquet"
        commands += [
            ["embed-new", drop(lake, name), "--model", lake / "model", "--output", folder],
            ["pool-buildings", "--embeddings", folder, "--output", pooled],
        ]
    for command in commands:
        assert not shell.report(*command)["up_to_date"], command
        assert shell.report(*command)["up_to_date"], command


def photographs(tar: Path) -> list[bytes]:
    with tarfile.open(tar) as archive:
        pictures = [member for member in archive if member.name.endswith(".jpg")][:4]
        return [*(archive.extractfile(member).read() for member in pictures), b"no picture"]  # type: ignore[union-attr]


def identifiers() -> dict[str, pa.Array]:
    return {
        "texts": pa.array(["way/1", "way/1", "way/2", None, "way/9"]),
        "numbers": pa.array([10**15, 7, 7, 7, 9], pa.int64()),
        "decimals": pa.array([Decimal("1.50")] * 5, pa.decimal128(30, 2)),
    }


def drop(lake: Path, name: str) -> Path:
    (lake / "drops").mkdir(exist_ok=True)
    return lake / f"drops/{name}.parquet"


def look_around(shell: Shell, images: int) -> None:
    """What the lake says of itself afterwards."""
    states = [row for row in json.loads(shell.run("status", "--json")) if row["asset"] in MADE]
    assert {row["state"] for row in states} == {"made"}, [row for row in states if row["state"] != "made"]
    assert {row["asset"] for row in states} == MADE
    stats = json.loads(shell.run("stats", "--json"))
    assert stats["total"]["images"] == images
    assert images == int(shell.run("sql", "select sum(images) as n from tar_statistics", "--format", "csv").split()[1])

    for asset in MADE:
        counted = " ".join(("select count(*) as n from", asset))
        assert int(shell.run("sql", counted, "--format", "csv").split()[1]) > 0, asset

    vectors = shell.folder / "vectors.parquet"
    shell.run("sql", 'select "drop", OSMID::varchar as id, embedding from final_embeddings', "--output", vectors)
    found = pq.read_table(vectors)
    assert found.num_rows == 3 * 4
    np.testing.assert_allclose(np.linalg.norm(np.stack(found["embedding"].to_numpy()), axis=1), 1, atol=1e-5)
    for name, ids in identifiers().items():
        parts = pq.read_table(shell.lake / f"final_embeddings/{name}/parts")
        assert parts.schema.field("OSMID").type == ids.type
        assert parts["OSMID"].to_pylist() == ids.to_pylist()[:4]
    assert (
        "9"
        in duckdb.read_parquet(str(shell.lake / "final_embeddings/numbers/rejects.parquet"))
        .to_arrow_table()["OSMID"]
        .cast(pa.string())
        .to_pylist()
    )
    card = (shell.lake / "model/README.md").read_text()
    assert "recall@1" in card
    page = (shell.lake / "report/report.html").read_text()
    assert "data:image/jpeg;base64," in page, "the gallery has its pictures"
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


@pytest.mark.slow
def test_the_chain_by_its_commands(shell: Shell) -> None:
    images = 0
    for key in KEYS:
        entries = street_view(int(key), seed=3, targets=14, side_px=96)
        images += len(entries) // 2
        (shell.lake / f"raw/{key}.tar").write_bytes(tar_bytes(entries))
    walk_the_chain(shell)
    look_around(shell, images)


@pytest.mark.slow
@pytest.mark.real_data
def test_the_chain_on_two_real_tars(shell: Shell, real_data: Path) -> None:
    for key in KEYS:
        (shell.lake / f"raw/{key}.tar").write_bytes((real_data / f"buildings/{key}.tar").read_bytes())
    walk_the_chain(shell)
    look_around(shell, 21 + 39)
