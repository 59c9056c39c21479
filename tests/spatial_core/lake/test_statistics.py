"""Per-tar statistics against a plain loop over the same rows, in the library, in SQL and on the command line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from spatial_core import schemas
from spatial_core.cli.main import app
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import ArtifactError
from spatial_core.lake.sql import query_lake
from spatial_core.lake.statistics import tar_files, tar_statistics, total
from spatial_core.quality.repetition import images_unique
from tests.data.make_rows import intermediates, rejects


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(overrides=[f"paths.data_dir={tmp_path}"], environ={})


def tar(settings: Settings, key: str, views: list[int], reasons: dict[str, int], seed: int = 0) -> list[dict[str, Any]]:
    """A tar whose buildings have so many views each; returns its rows."""
    rng = np.random.default_rng([seed, int(key)])
    rows = []
    for target, count in enumerate(views):
        for _ in range(count):
            patch = len(rows)
            rows.append(
                {
                    **dict.fromkeys((field.name for field in schemas.GEOMETRY), 1.0),
                    "target_id": target,
                    "patch_id": patch,
                    "distance_m": float(rng.uniform(5, 80)),
                    "alignment_similarity": 0.5 if patch % 3 == 0 else None,
                    "image_bytes": int(rng.integers(1000, 9000)),
                    "image_sha256": f"{key}{patch:04d}",
                }
            )
    at = settings.locations.intermediates_dir
    intermediates(at / f"{key}.parquet", int(key), rows)
    rejects(at / f"{key}_rejects.parquet", key, reasons)
    return rows


def plain(key: str, rows: list[dict[str, Any]], reasons: dict[str, int], seen: Counter[str]) -> dict[str, Any]:
    """The same figures, one row at a time."""
    views = Counter(row["target_id"] for row in rows)
    distances = sorted(row["distance_m"] for row in rows)
    folders = reasons.get("directory", 0)
    refused = {reason: count for reason, count in reasons.items() if reason != "directory"}
    return {
        "tar": key,
        "members": 2 * len(rows) + sum(reasons.values()),
        "rejected": sum(refused.values()),
        "folders": folders,
        "reasons": refused,
        "images": len(rows),
        "buildings": len(views),
        "singletons": sum(count == 1 for count in views.values()),
        "images_per_building": pytest.approx(len(rows) / len(views)) if views else None,
        "distance_mean_m": pytest.approx(sum(distances) / len(rows)) if rows else None,
        "distance_p95_m": pytest.approx(np.quantile(distances, 0.95)) if rows else None,
        "aligned_images": sum(row["alignment_similarity"] is not None for row in rows),
        "repeated_images": sum(seen[row["image_sha256"]] > 1 for row in rows),
        "image_mb": pytest.approx(sum(row["image_bytes"] for row in rows) / 1e6),
    }


CASES: dict[str, tuple[list[int], dict[str, int]]] = {
    "0201": ([3, 1, 2, 1], {"image_corrupt": 2, "partner_rejected": 2, "directory": 3}),
    "0202": ([5], {}),
    "0203": ([1, 1, 1], {"directory": 1}),
}


def test_figures_are_those_of_a_plain_loop(settings: Settings) -> None:
    made = {key: tar(settings, key, *case) for key, case in CASES.items()}
    # One picture of 0201 occurs again in 0203, under another building.
    made["0203"][1]["image_sha256"] = made["0201"][4]["image_sha256"]
    intermediates(settings.locations.intermediates_dir / "0203.parquet", 203, made["0203"])
    seen = Counter(row["image_sha256"] for rows in made.values() for row in rows)
    expected = [plain(key, made[key], CASES[key][1], seen) for key in CASES]
    found = tar_statistics(*tar_files(settings))
    assert [asdict(figures) for figures in found] == expected
    assert [figures.singleton_share for figures in found] == [0.5, 0.0, 1.0]
    assert list(found[0].reasons) == ["image_corrupt", "partner_rejected"]
    assert total(found)["images"] == 7 + 5 + 3
    (row,) = query_lake(
        settings, "select images, reasons['image_corrupt'] from tar_statistics where tar = '0201'"
    ).fetchall()
    assert row == (7, 2)


def test_a_tar_of_which_nothing_could_be_used_has_its_rejects_counted(settings: Settings) -> None:
    tar(settings, "0201", [2], {})
    path = settings.locations.raw_dir / "0202.tar"
    path.parent.mkdir(parents=True)
    path.touch()
    rejects(settings.locations.intermediates_dir / "0202_rejects.parquet", "0202", {"orphan_text": 4})
    first, second = tar_statistics(*tar_files(settings))
    assert (first.images, first.rejected) == (2, 0)
    assert (second.tar, second.images, second.rejected, second.members, second.distance_mean_m) == (
        "0202",
        0,
        4,
        4,
        None,
    )


def test_files_of_the_earlier_pipeline_lack_columns_and_are_counted_all_the_same(settings: Settings) -> None:
    tar(settings, "0201", [2], {})
    path = settings.locations.intermediates_dir / "0201.parquet"
    pq.write_table(pq.read_table(path, columns=[field.name for field in (*schemas.IDENTITY, *schemas.SOURCE)]), path)
    (found,) = tar_statistics(*tar_files(settings))
    assert (found.images, found.buildings, found.distance_mean_m, found.image_mb) == (2, 1, None, 0)
    assert images_unique(settings).passed


def test_a_damaged_file_is_named(settings: Settings, tmp_path: Path) -> None:
    tar(settings, "0201", [2], {})
    path = settings.locations.intermediates_dir / "0201.parquet"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"0201.*rerun ingest"):
        tar_statistics(*tar_files(settings))


def test_the_same_picture_under_two_labels_is_pointed_out(settings: Settings) -> None:
    assert images_unique(settings).passed, "an empty lake"
    made = {key: tar(settings, key, *CASES[key]) for key in ("0201", "0202")}
    made["0202"][0]["image_sha256"] = made["0202"][1]["image_sha256"]
    intermediates(settings.locations.intermediates_dir / "0202.parquet", 202, made["0202"])
    outcome = images_unique(settings)
    assert outcome.passed, "twice under one facade point is no fault"
    assert outcome.figures["repeated_images"] == 2
    made["0202"][3]["image_sha256"] = made["0201"][0]["image_sha256"]
    intermediates(settings.locations.intermediates_dir / "0202.parquet", 202, made["0202"])
    outcome = images_unique(settings)
    assert not outcome.passed
    assert outcome.severity == "warn"
    assert "0201_0 = 0202_0" in outcome.summary


def test_on_the_command_line(settings: Settings, tmp_path: Path) -> None:
    for key, case in CASES.items():
        tar(settings, key, *case)
    config = tmp_path / "config.toml"
    config.write_text(f"[paths]\ndata_dir = '{tmp_path}'\n")
    runner = CliRunner()
    shown = runner.invoke(app, ["stats", "0201", "0202", "--config", str(config), "--json"])
    record = json.loads(shown.stdout)
    assert [entry["tar"] for entry in record["tars"]] == ["0201", "0202"]
    assert record["tars"][0]["reasons"] == {"image_corrupt": 2, "partner_rejected": 2}
    assert record["total"]["images"] == 12
    table = runner.invoke(app, ["stats", "--config", str(config)], env={"COLUMNS": "200"}).stdout
    assert "2 image_corrupt" in table
    missing = runner.invoke(app, ["stats", "0999", "--config", str(config)])
    assert "0999: not ingested; there are 0201, 0202, 0203" in str(missing.exception)


def test_nothing_ingested_is_an_empty_table(settings: Settings) -> None:
    assert tar_statistics({}, {}) == []
