"""What no camera knows: which building, style and drive each picture is of. Kept beside the city for tests and people.

A truth table also stands for the file it describes: its manifest holds that file's digest, so that watched folders hold
nothing but what is watched for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from spatial_core.config.settings import Settings
from spatial_core.demo.camera_car import Shot
from spatial_core.errors import InputError
from spatial_core.report import Report
from spatial_core.storage.digests import sha256_file
from spatial_core.storage.parquet import parquet_sink, read_provenance
from spatial_core.storage.provenance import Provenance, finished, read_manifest, record_artifact, stage_key

STAGE = "demo-data"
CODE_VERSION = "1"
_WAY_OUT = "move it away, or name another folder"

TRUTH = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("building_id", pa.string()),
        pa.field("osmid", pa.int64()),
        pa.field("physical_building", pa.string(), nullable=False),
        pa.field("style", pa.string(), nullable=False),
        pa.field("drive", pa.int32(), nullable=False),
        pa.field("season", pa.int32(), nullable=False),
        pa.field("dusk", pa.bool_(), nullable=False),
    ]
)


def truth_row(shot: Shot, *, file: str, row: int, building_id: str | None, osmid: int | None) -> dict[str, Any]:
    """One row: the member of a tar, or the row of a drop, that shows `shot`.

    `building_id` is None for buildings that are in no tar, `osmid` None outside drops.
    """
    return {
        "file": file,
        "row": row,
        "building_id": building_id,
        "osmid": osmid,
        "physical_building": shot.building,
        "style": shot.style,
        "drive": shot.drive,
        "season": shot.season,
        "dusk": shot.dusk,
    }


@dataclass
class Ledger:
    """Decides whether a file of the city must be written, and declares it finished with its truth table.

    Args:
        path: the tar or drop.
        truth: its truth table.
        settings: all settings.
        config: those that decide the file's content.
    """

    path: Path
    truth: Path
    settings: Settings
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._key = stage_key(STAGE, CODE_VERSION, self.config, {})
        self._started = time.perf_counter()
        self._before: str | None = None

    def require_own(self) -> None:
        """Leave a file alone that was not drawn here: a tar of the real data set may bear the same number.

        Raises:
            InputError: if the file, or the truth table, is there and is not as a run of this stage left it.
        """
        record = read_manifest(self.truth)
        if record is None and self.truth.exists() and not self._is_truth():
            raise InputError(f"{self.truth}: is no truth table of `demo-data` and would be overwritten; {_WAY_OUT}")
        if not self.path.exists():
            return
        details = {} if record is None else record["report"]["details"]
        found = sha256_file(self.path) if self.path.is_file() else "a folder"
        if found not in {details.get("file_sha256"), details.get("replaced_sha256")}:
            raise InputError(
                f"{self.path}: was not drawn by `demo-data`, or was changed since, and would be overwritten; {_WAY_OUT}"
            )
        self._before = found

    def _is_truth(self) -> bool:
        try:
            provenance = read_provenance(self.truth)
        except InputError:  # no parquet
            return False
        return provenance is not None and provenance.stage == STAGE

    def unchanged(self) -> Report | None:
        """The report of a file that still is, byte for byte, what was written for the same settings; else None."""
        report = finished(self.truth, self._key)
        if report is None or not self.path.is_file() or sha256_file(self.path) != report.details["file_sha256"]:
            return None
        return report

    def provenance(self, inputs: Mapping[str, str] | None = None) -> Provenance:
        return Provenance(STAGE, CODE_VERSION, self.settings.digest, self.config, dict(inputs or {}))

    def close(self, drawn: Path, rows: list[dict[str, Any]], faults_planted: int) -> Report:
        """Write the truth table and the manifest of the file, which is whole but still under its temporary name.

        A run that is killed before it has its own name finds it missing, or the one it was to replace; both may be
        drawn again. Recorded afterwards, a file could lie there that nothing tells from somebody else's.
        """
        digest = sha256_file(drawn)
        provenance = self.provenance({self.path.name: digest})
        with parquet_sink(self.truth, TRUTH, provenance) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=TRUTH))
        report = Report(
            stage=STAGE,
            artifact=self.truth,
            rows=len(rows),
            rows_in=len(rows),
            kept=len(rows),
            unit="images",
            seconds=time.perf_counter() - self._started,
            bytes=self.truth.stat().st_size,
            details={
                "file_sha256": digest,
                "file_bytes": drawn.stat().st_size,
                "replaced_sha256": self._before,
                "faults_planted": faults_planted,
            },
        )
        record_artifact(self.truth, self._key, provenance, report)
        return report
