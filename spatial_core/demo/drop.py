"""Writes the drop: new pictures with OSMIDs, half of buildings that are in no tar, half new views of ones that are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spatial_core.config.settings import Settings
from spatial_core.demo.camera_car import Job
from spatial_core.demo.fleet import Fleet
from spatial_core.demo.layout import FIRST_DATASET, UNSEEN_DISTRICT, plan_district
from spatial_core.demo.tars import FIRST_PATCH
from spatial_core.demo.truth import Ledger, truth_row
from spatial_core.report import Report
from spatial_core.storage.atomic import atomic_file, exclusive
from spatial_core.storage.parquet import write_options
from spatial_core.storage.provenance import FOOTER_KEY

FIRST_OSMID = 870_000_001
_VIEWS = 3
_INVALID_EVERY = 20

DROP = pa.schema(
    [
        pa.field("image_bytes", pa.binary(), nullable=False),
        pa.field("OSMID", pa.int64(), nullable=False),
        pa.field("is_valid", pa.bool_(), nullable=False),
    ]
)


def drop_ledger(path: Path, truth_dir: Path, settings: Settings) -> Ledger:
    """What tells whether the drop must be written, and may be."""
    return Ledger(path, truth_dir / path.name, settings, settings.pick("global.seed", "demo"))


def write_drop(path: Path, truth_dir: Path, settings: Settings, fleet: Fleet) -> Report:
    """Write the parquet of new pictures, unless it is there as it would be written."""
    ledger = drop_ledger(path, truth_dir, settings)
    with exclusive(path):
        if (report := ledger.unchanged()) is not None:
            return report
        ledger.require_own()
        images: dict[str, list[Any]] = {"image_bytes": [], "OSMID": [], "is_valid": []}
        rows: list[dict[str, Any]] = []
        jobs = list(_jobs(settings))
        for number, (job, shots) in enumerate(zip(jobs, fleet.take_all(jobs), strict=True)):
            osmid = FIRST_OSMID + 37 * number
            for shot in shots:
                seen = job.district != UNSEEN_DISTRICT
                building_id = f"{FIRST_DATASET + job.district:04d}_{shot.target_id}" if seen else None
                rows.append(truth_row(shot, file=path.name, row=len(rows), building_id=building_id, osmid=osmid))
                images["image_bytes"].append(shot.jpeg)
                images["OSMID"].append(osmid)
                images["is_valid"].append(len(rows) % _INVALID_EVERY != 0)
        schema = DROP.with_metadata({FOOTER_KEY: ledger.provenance().to_json().encode()})
        with atomic_file(path) as temporary:
            with pq.ParquetWriter(temporary, schema, **write_options(schema)) as writer:
                writer.write_table(pa.table(images, schema=schema))
            return ledger.close(temporary, rows, 0)


def _jobs(settings: Settings) -> Iterator[Job]:
    """A few views of one facade point after another until there are enough, alternately unseen and from a tar."""
    demo, left = settings.demo, settings.demo.drop_images
    for number in range(2 * demo.buildings_per_tar):
        unseen = number % 2 == 0
        district = UNSEEN_DISTRICT if unseen else (number // 2) % demo.tars
        points = demo.drop_images if unseen else demo.buildings_per_tar
        # Steps through the plan, so that the drop does not come from one end of one street.
        index = (number // 2) * 7 % points
        target = plan_district(settings.seed, demo, district, points).targets[index]
        stops = (target.views if unseen else target.spare)[: min(_VIEWS, left)]
        left -= len(stops)
        if stops:
            yield Job(
                seed=settings.seed,
                demo=demo,
                district=district,
                points=points,
                target=index,
                stops=stops,
                first_patch=FIRST_PATCH,
            )
