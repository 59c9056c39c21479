"""Stage `usage`: the record of all job endings -> a table, a page with a chart, and figures by asset.

Runs append a line for each job whose end they see to `usage.jsonl` in the folder of jobs. Two runs that followed the
same job have both written its line; it counts once. A line that is not such a record, such as one cut short when the
disk was full, is counted as rejected with its reason.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from spatial_core import schemas
from spatial_core.cluster import usage_page
from spatial_core.config.settings import Settings
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import atomic_file, exclusive
from spatial_core.storage.parquet import parquet_sink
from spatial_core.storage.provenance import Provenance, finished, record_artifact, stage_key

STAGE = "usage"
CODE_VERSION = "1"
_UNKNOWN_TIMES = {"", "Unknown", "None"}

Ending = Mapping[str, Any]


@dataclass(frozen=True)
class AssetUsage:
    """What the jobs of one asset used.

    Args:
        asset: its name.
        jobs: job endings.
        states: how they ended -> how many.
        elapsed_s: seconds they ran, summed.
        gpu_s, core_s: GPU and core seconds that were allocated.
        cpu_share: used share of the core seconds, over jobs for which accounting knows it; None when for none.
        memory_mb, memory_asked_mb: largest peak, and largest memory asked for, MiB; None when never known.
        cost: at the prices of the settings when they ended.
    """

    asset: str
    jobs: int
    states: Mapping[str, int]
    elapsed_s: int
    gpu_s: int
    core_s: int
    cpu_share: float | None
    memory_mb: float | None
    memory_asked_mb: float | None
    cost: float


def collect_usage(usage_file: Path, output_file: Path, settings: Settings, progress: Progress = silent) -> Report:
    """Make the table of job endings, and the page beside it.

    Args:
        usage_file: JSON lines that runs appended; none there means that no job has ended yet.
        output_file: parquet to write, columns `schemas.CLUSTER_USAGE`; the page takes its name with `.html`.
        settings: not used but for their digest.
        progress: called once, with the lines read.

    Returns:
        Report in lines, its details the figures by asset.
    """
    started = time.perf_counter()
    content = usage_file.read_bytes() if usage_file.exists() else b""
    inputs = {"usage": hashlib.sha256(content).hexdigest()}
    key = stage_key(STAGE, CODE_VERSION, {}, inputs)
    with exclusive(output_file):
        if (done := finished(output_file, key)) is not None:
            return done
        lines = content.splitlines()
        endings, rejected = read_endings(lines)
        progress(len(lines), len(lines), "reading job endings")
        usage = by_asset(endings)
        with atomic_file(page_of(output_file)) as temporary:
            temporary.write_text(usage_page.render(usage, len(endings)), encoding="utf-8")
        provenance = Provenance(STAGE, CODE_VERSION, settings.digest, {}, inputs)
        with parquet_sink(output_file, schemas.CLUSTER_USAGE, provenance) as writer:
            writer.write_table(pa.Table.from_pylist(list(endings), schema=schemas.CLUSTER_USAGE))
        report = Report(
            stage=STAGE,
            artifact=output_file,
            rows=len(endings),
            rows_in=len(lines),
            kept=len(endings),
            rejected=rejected,
            seconds=time.perf_counter() - started,
            bytes=output_file.stat().st_size,
            unit="lines",
            details={"assets": [{**vars(one), "states": dict(one.states)} for one in usage]},
        )
        record_artifact(output_file, key, provenance, report)
    return report


def page_of(artifact: Path) -> Path:
    """The page beside the table."""
    return artifact.with_suffix(".html")


def read_endings(lines: Iterable[bytes]) -> tuple[list[Ending], dict[str, int]]:
    """Job endings in the order they were written, each once; and how many lines were left out, by reason."""
    rejected: Counter[str] = Counter()
    kept: dict[tuple[str, Any], Ending] = {}
    for line in lines:
        try:
            ending = _ending(json.loads(line))
        except (ValueError, TypeError, KeyError):
            rejected["not a record of a job's end"] += 1
            continue
        name = (ending["job"], ending["start"])
        if name in kept:
            rejected["written twice"] += 1
            del kept[name]  # the later one stands, in its own place
        kept[name] = ending
    return list(kept.values()), dict(rejected)


def by_asset(endings: Iterable[Ending]) -> list[AssetUsage]:
    """Figures of each asset: dearest first, then by GPU and core time."""
    groups: defaultdict[str, list[Ending]] = defaultdict(list)
    for ending in endings:
        groups[ending["asset"]].append(ending)
    found = [_summed(asset, group) for asset, group in groups.items()]
    return sorted(found, key=lambda one: (-one.cost, -one.gpu_s, -one.core_s, one.asset))


def _summed(asset: str, endings: Sequence[Ending]) -> AssetUsage:
    known = [ending for ending in endings if ending["cpu_s"] is not None and ending["core_s"]]
    peaks = [ending["memory_mb"] for ending in endings if ending["memory_mb"] is not None]
    asked = [ending["memory_asked_mb"] for ending in endings if ending["memory_asked_mb"] is not None]
    cores = sum(ending["core_s"] for ending in known)
    return AssetUsage(
        asset,
        len(endings),
        dict(sorted(Counter(ending["state"] for ending in endings).items())),
        elapsed_s=sum(ending["elapsed_s"] for ending in endings),
        gpu_s=sum(ending["gpu_s"] for ending in endings),
        core_s=sum(ending["core_s"] for ending in endings),
        cpu_share=sum(ending["cpu_s"] for ending in known) / cores if cores else None,
        memory_mb=max(peaks, default=None),
        memory_asked_mb=max(asked, default=None),
        cost=round(sum(ending["cost"] for ending in endings), 6),
    )


def _ending(record: Any) -> Ending:
    """A record with the types of the schema.

    Raises:
        ValueError, TypeError, KeyError: if it is not one.
    """
    return {field.name: _value(record[field.name], field) for field in schemas.CLUSTER_USAGE}


def _value(value: Any, field: pa.Field) -> Any:
    if pa.types.is_timestamp(field.type):
        return None if value in _UNKNOWN_TIMES else datetime.fromisoformat(value).replace(tzinfo=None)
    if value is None and field.nullable:
        return None
    if pa.types.is_string(field.type):
        good = isinstance(value, str)
    else:
        wanted = int if pa.types.is_integer(field.type) else (int, float)
        # A negative number is no time, memory or cost. `nan` is not below zero, but not above it either.
        good = isinstance(value, wanted) and not isinstance(value, bool) and value >= 0
    if not good:
        raise ValueError(f"{field.name} is {value!r}")
    return float(value) if pa.types.is_floating(field.type) else value
