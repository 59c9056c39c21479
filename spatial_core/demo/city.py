"""Writes the demo city: raw tars in the layout of the 3D Street View data set, and a drop of new pictures."""

from __future__ import annotations

import time
from pathlib import Path

from spatial_core.config.settings import Settings
from spatial_core.demo.drop import drop_ledger, write_drop
from spatial_core.demo.fleet import Fleet
from spatial_core.demo.tars import CityTar
from spatial_core.demo.truth import CODE_VERSION, STAGE
from spatial_core.report import Progress, Report, silent
from spatial_core.storage.atomic import exclusive

__all__ = ["CODE_VERSION", "DROP_NAME", "STAGE", "write_city"]

DROP_NAME = "new_images.parquet"


def write_city(*, output_dir: Path, settings: Settings, progress: Progress = silent) -> Report:
    """Write `raw/NNNN.tar`, `drops/new_images.parquet` and `demo_truth/` under `output_dir`.

    A file that is there as it was last written is left alone, one that is missing or of other settings is drawn. Where
    a file lies that was not drawn here, or was changed since, nothing is drawn at all.
    `progress` counts pictures. The report's rows are the pictures with a record in the tars.

    Raises:
        InputError: if a file would be overwritten that this stage did not write; names it.
        ArtifactBusy: if another process is writing the same city.
    """
    started = time.perf_counter()
    truth_dir = output_dir / "demo_truth"
    drop_path = output_dir / "drops" / DROP_NAME
    tars = [CityTar(number, output_dir / "raw", settings) for number in range(settings.demo.tars)]
    with exclusive(truth_dir), Fleet() as fleet:
        for ledger in (*(tar.ledger(truth_dir) for tar in tars), drop_ledger(drop_path, truth_dir, settings)):
            ledger.require_own()
        total = sum(tar.images for tar in tars)
        reports: list[Report] = []
        for tar in tars:
            before = sum(report.rows for report in reports)
            reports.append(tar.write(truth_dir, fleet, _offset(progress, before, total)))
            progress(before + tar.images, total, tar.path.name)
        drop = write_drop(drop_path, truth_dir, settings, fleet)
    files = [*reports, drop]
    points = [(tar.number, target) for tar in tars for target in tar.district.targets]
    report = Report(
        stage=STAGE,
        artifact=output_dir,
        rows=total,
        rows_in=total,
        kept=total,
        unit="images",
        seconds=time.perf_counter() - started,
        bytes=sum(int(file.details["file_bytes"]) for file in files),
        details={
            "tars": len(tars),
            "facade_points": len(points),
            "buildings": len({(number, target.street, target.building) for number, target in points}),
            "views": total,
            "faults_planted": sum(int(file.details["faults_planted"]) for file in files),
            "drop_rows": drop.rows,
        },
    )
    return report.unchanged() if all(file.up_to_date for file in files) else report


def _offset(progress: Progress, before: int, total: int) -> Progress:
    """Progress of one tar as progress of the whole city."""

    def forward(done: int, total: int | None, message: str) -> None:
        progress(before + done, city_total, message)

    city_total = total
    return forward
