"""What cluster jobs used: every line accounted for, sums right, a page and a picture that stand on their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from spatial_core import schemas
from spatial_core.cluster.ending import Ending, usage_record
from spatial_core.cluster.usage import AssetUsage, by_asset, collect_usage, page_of, read_endings
from spatial_core.cluster.usage_page import HEADER, cells, picture
from spatial_core.config.settings import Settings, load_settings
from spatial_core.lake.sql import query_lake
from spatial_core.lake.status import lake_status
from spatial_core.quality.checks import usage_sound
from spatial_core.storage.provenance import verify_artifact

PRICES = (3.0, 0.05)
TRAINING = Ending(
    "31", "COMPLETED", elapsed_s=7200, cpu_s=18_000.0, cores_s=57_600, memory_mb=20_000.0, memory_asked_mb=262_144.0,
    gpus=1, node="node2", partition="gpu", start="2026-01-02T03:04:05", end="2026-01-02T05:04:05",
)  # fmt: skip
TAR = Ending(
    "12_0", "COMPLETED", elapsed_s=600, cpu_s=540.0, cores_s=600, memory_mb=700.0, memory_asked_mb=32_768.0,
    node="node1", partition="cpu", start="2026-01-01T00:00:00", end="2026-01-01T00:10:00",
)  # fmt: skip
OUT_OF_MEMORY = Ending(
    "12_1", "OUT_OF_MEMORY", elapsed_s=60, cpu_s=30.0, cores_s=60, memory_mb=900.0, memory_asked_mb=800.0,
    node="node1", partition="cpu", start="2026-01-01T00:00:00", end="2026-01-01T00:01:00",
)  # fmt: skip
VANISHED = Ending("12_2", "VANISHED")


def line(ending: Ending, asset: str = "intermediates", key: str = "0001", **said: Any) -> bytes:
    return json.dumps(usage_record(ending, asset, key, said, PRICES)).encode()


LINES = [
    line(TAR),
    line(OUT_OF_MEMORY, key="0002"),
    line(VANISHED, key="0003"),
    line(TRAINING, "projector_checkpoint", "", gpu_utilisation=0.8),
]


def write(folder: Path, *lines: bytes) -> Path:
    path = folder / "jobs" / "usage.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_every_line_is_a_row_or_a_counted_rejection(tmp_path: Path) -> None:
    broken = [b"{", b"[]", b'"text"', b"null", b"\xff\xfe", b"{}"]
    negative = line(TAR).replace(b'"elapsed_s": 600', b'"elapsed_s": -600')
    for name, value in (("cost", b"NaN"), ("job", b"12"), ("core_s", b"1.5"), ("gpu_s", b"true"), ("start", b'"soon"')):
        record = json.loads(line(TAR)) | {name: "@"}
        broken.append(json.dumps(record).encode().replace(b'"@"', value))
    cut = LINES[0][:40]
    source = write(tmp_path, *LINES, *broken, negative, cut, LINES[0])
    report = collect_usage(source, tmp_path / "usage.parquet", Settings())
    assert report.rows_in == 4 + len(broken) + 3
    assert report.rejected == {"not a record of a job's end": len(broken) + 2, "written twice": 1}
    assert report.rows == report.kept == 4


def test_the_table_has_the_schema_and_what_accounting_said(tmp_path: Path) -> None:
    artifact = tmp_path / "usage.parquet"
    collect_usage(write(tmp_path, *LINES), artifact, Settings())
    verify_artifact(artifact)
    table = pq.read_table(artifact)
    assert table.schema.remove_metadata().equals(schemas.CLUSTER_USAGE.remove_metadata())
    rows = {row["job"]: row for row in table.to_pylist()}
    assert rows["31"]["gpu_s"] == 7200 and rows["31"]["gpu_utilisation"] == 0.8
    assert rows["31"]["cost"] == pytest.approx(2 * 3.0 + 16 * 0.05)
    assert str(rows["31"]["end"] - rows["31"]["start"]) == "2:00:00"
    assert rows["12_2"]["start"] is None and rows["12_2"]["memory_mb"] is None and rows["12_2"]["cost"] == 0
    outcome = usage_sound(artifact)
    assert outcome.passed and outcome.summary == "4 jobs"


def test_figures_by_asset_are_those_of_a_plain_sum() -> None:
    endings, rejected = read_endings(LINES)
    assert rejected == {}
    training, tars = by_asset(endings)
    assert training.asset == "projector_checkpoint", "the dearest first"
    assert tars == AssetUsage(
        "intermediates", 3, {"COMPLETED": 1, "OUT_OF_MEMORY": 1, "VANISHED": 1}, elapsed_s=660, gpu_s=0, core_s=660,
        cpu_share=570 / 660, memory_mb=900.0, memory_asked_mb=32_768.0, cost=0.008333 + 0.000833,
    )  # fmt: skip
    assert dict(zip(HEADER, cells(tars), strict=True)) == {
        "asset": "intermediates", "jobs": "3", "not completed": "1 OUT_OF_MEMORY, 1 VANISHED", "GPU hours": "-",
        "core hours": "0.18", "cores used": "86%", "peak memory": "0.9 GiB", "memory asked": "32.0 GiB", "cost": "0.01",
    }  # fmt: skip


def test_the_later_of_two_lines_about_a_job_counts() -> None:
    """A job that was requeued has the same id and another start."""
    first = line(TAR)
    later = line(TAR, gpu_utilisation=0.5)
    again = first.replace(b"2026-01-01T00:00:00", b"2026-01-01T08:00:00").replace(b"T00:10:00", b"T08:10:00")
    endings, rejected = read_endings([first, again, later])
    assert rejected == {"written twice": 1}
    assert [ending["gpu_utilisation"] for ending in endings] == [None, 0.5]


def test_the_picture_is_an_image_file_of_its_own_and_escapes_names() -> None:
    endings, _ = read_endings([line(TRAINING, "<b>&", ""), *LINES[:1]])
    drawn = picture(by_asset(endings))
    root = ET.fromstring(drawn)  # noqa: S314 - drawn a line above
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text in {"GPU hours", "cost"}] == ["GPU hours", "cost"]
    assert texts.count("<b>&") == 4 and "2.00" in texts and "16.00, 31% used" in texts
    widths = {
        rect.get("class"): float(rect.get("width", "0")) for rect in root.iter("{http://www.w3.org/2000/svg}rect")
    }
    assert max(widths.values()) == widths["track"]
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", ""), "nothing is fetched"
    free = [json.loads(text) | {"cost": 0.0, "gpu_s": 0} for text in LINES]
    unpriced = picture(by_asset(read_endings([json.dumps(one).encode() for one in free])[0]))
    assert "GPU hours" not in unpriced and ">cost<" not in unpriced


def test_nothing_ended_yet_is_an_empty_table(tmp_path: Path) -> None:
    report = collect_usage(tmp_path / "none.jsonl", tmp_path / "usage.parquet", Settings())
    assert report.rows == report.rows_in == 0
    assert "No job has ended yet" in page_of(report.artifact).read_text()
    assert usage_sound(report.artifact).passed


def test_the_same_lines_are_not_gathered_twice_and_a_new_one_is(tmp_path: Path) -> None:
    artifact = tmp_path / "usage.parquet"
    first = collect_usage(write(tmp_path, *LINES[:2]), artifact, Settings())
    page = page_of(artifact).read_bytes()
    assert collect_usage(write(tmp_path, *LINES[:2]), artifact, Settings()).up_to_date
    assert not first.up_to_date
    again = collect_usage(write(tmp_path, *LINES), artifact, Settings())
    assert not again.up_to_date and again.rows == 4
    assert page_of(artifact).read_bytes() != page


def test_a_table_that_lists_a_job_twice_fails_its_check(tmp_path: Path) -> None:
    artifact = tmp_path / "usage.parquet"
    collect_usage(write(tmp_path, *LINES), artifact, Settings())
    table = pq.read_table(artifact)
    rows = table.to_pylist()
    rows[0]["start"], rows[0]["end"] = rows[0]["end"], rows[0]["start"]
    rows[1]["cost"] = float("nan")
    pq.write_table(type(table).from_pylist([*rows, rows[0]], schema=table.schema), artifact)
    outcome = usage_sound(artifact)
    assert not outcome.passed
    assert outcome.summary == "1 jobs are listed twice; 2 jobs ended before they started; 1 jobs have no cost"


def test_the_lake_knows_the_table_and_the_command_line_prints_it(tmp_path: Path) -> None:
    settings = load_settings(overrides=[f"paths.data_dir={tmp_path}"], environ={})
    (status,) = [row for row in lake_status(settings) if row.asset == "cluster_usage"]
    assert (status.state, status.why) == ("on demand", "")
    at = settings.locations
    collect_usage(write(tmp_path, *LINES), at.cluster_usage_path, settings)
    (status,) = [row for row in lake_status(settings) if row.asset == "cluster_usage"]
    assert (status.state, status.rows) == ("made", 4)
    assert query_lake(settings, "select sum(gpu_s) from cluster_usage").fetchall() == [(7200,)]
    argv = [sys.executable, "-m", "spatial_core.cli.main", "cluster", "usage", "--set", f"paths.data_dir={tmp_path}"]
    write(tmp_path, *LINES, b"not one")
    shown = subprocess.run(
        argv, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}, cwd=tmp_path
    )
    assert "projector_checkpoint" in shown.stdout and "4 jobs" in shown.stdout
    assert "1 lines of" in shown.stderr and "left out: not a record of a job's end" in shown.stderr
    record = json.loads(subprocess.run([*argv, "--json"], capture_output=True, check=True, cwd=tmp_path).stdout)
    assert [one["asset"] for one in record["assets"]] == ["projector_checkpoint", "intermediates"]
    assert record["rejected"] == {"not a record of a job's end": 1}
