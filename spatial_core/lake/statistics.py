"""What each tar gave: images, buildings, rejections by reason, distances. DuckDB counts; nothing is held in memory.

The same query answers `spatial stats`, the view `tar_statistics` of `spatial sql`, and what Dagster shows of one tar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import duckdb

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError
from spatial_core.lake.catalogue import CATALOGUE, known_keys
from spatial_core.lake.duck import query_connection, quoted
from spatial_core.schemas import FOLDER_REASON

_ROWS = {
    "building_id": "varchar",
    "image_sha256": "varchar",
    "distance_m": "double",
    "image_bytes": "bigint",
    "alignment_similarity": "double",
}
_REJECTS = {"reason": "varchar"}


@dataclass(frozen=True)
class TarStatistics:
    """Figures of one tar.

    Args:
        tar: partition key.
        members: tar members read.
        rejected: files among them that were refused; folder entries are not counted.
        folders: folder entries.
        reasons: reason -> files refused for it.
        images: rows of the intermediates.
        buildings: facade points with at least one image.
        singletons: buildings with a single image, which the splits leave out.
        images_per_building: mean.
        distance_mean_m: mean distance from camera to facade, metres.
        distance_p95_m: distance that 95 % of the images stay below, metres.
        aligned_images: images with alignment figures, aligned release only.
        repeated_images: images whose very bytes occur more than once, in this tar or among those asked for.
        image_mb: bytes of the images, in millions.
    """

    tar: str
    members: int
    rejected: int
    folders: int
    reasons: Mapping[str, int]
    images: int
    buildings: int
    singletons: int
    images_per_building: float | None
    distance_mean_m: float | None
    distance_p95_m: float | None
    aligned_images: int
    repeated_images: int
    image_mb: float

    @property
    def singleton_share(self) -> float:
        """Share of buildings with a single image."""
        return self.singletons / self.buildings if self.buildings else 0.0


def statistics_query(rows: Mapping[str, Path], rejects: Mapping[str, Path]) -> str:
    """SQL that gives one row a tar, columns as `TarStatistics`, sorted.

    Args:
        rows: partition key -> `NNNN.parquet`.
        rejects: partition key -> `NNNN_rejects.parquet`; a tar may have these alone.
    """
    images, listed = rows_of(rows, _ROWS), rows_of(rejects, _REJECTS)
    folder = quoted(FOLDER_REASON)
    return f"""
        with images as ({images}), listed as ({listed}),
        repeated as (select image_sha256 from images group by 1 having count(*) > 1),
        buildings as (select tar, building_id, count(*) as images from images group by all),
        per_building as (
            select tar, count(*) as buildings, count(*) filter (images = 1) as singletons, avg(images) as per_building
            from buildings group by tar
        ),
        per_image as (
            select tar, count(*) as images, avg(distance_m) as mean_m, quantile_cont(distance_m, 0.95) as p95_m,
                count(alignment_similarity) as aligned, sum(image_bytes) / 1e6 as mb,
                count(*) filter (image_sha256 in (from repeated)) as repeated
            from images group by tar
        ),
        per_reason as (select tar, reason, count(*) as files from listed group by all),
        per_tar as (
            select tar, coalesce(sum(files) filter (reason <> {folder}), 0)::bigint as rejected,
                coalesce(sum(files) filter (reason = {folder}), 0)::bigint as folders,
                coalesce(map_from_entries(list((reason, files) order by files desc, reason)
                    filter (reason <> {folder})), map()) as reasons
            from per_reason group by tar
        )
        select tar, 2 * coalesce(images, 0) + coalesce(rejected, 0) + coalesce(folders, 0) as members,
            coalesce(rejected, 0) as rejected, coalesce(folders, 0) as folders, coalesce(reasons, map()) as reasons,
            coalesce(images, 0) as images, coalesce(buildings, 0) as buildings, coalesce(singletons, 0) as singletons,
            per_building as images_per_building, mean_m as distance_mean_m, p95_m as distance_p95_m,
            coalesce(aligned, 0) as aligned_images, coalesce(repeated, 0) as repeated_images,
            coalesce(mb, 0) as image_mb
        from per_image full join per_tar using (tar) left join per_building using (tar)
        order by tar
    """


def tar_files(settings: Settings) -> tuple[dict[str, Path], dict[str, Path]]:
    """(partition key -> intermediates, partition key -> rejects), of what has been made."""
    at = settings.locations
    rows = {key: CATALOGUE["intermediates"].path(at, key) for key in known_keys(settings, "tar")}
    rejects = {key: path.with_name(f"{path.stem}_rejects.parquet") for key, path in rows.items()}
    return (
        {key: path for key, path in rows.items() if path.is_file()},
        {key: path for key, path in rejects.items() if path.is_file()},
    )


def tar_statistics(rows: Mapping[str, Path], rejects: Mapping[str, Path]) -> list[TarStatistics]:
    """Figures of each tar, sorted by key; see `statistics_query`.

    Raises:
        ArtifactError: if a file is damaged.
    """
    names = ", ".join(field.name for field in fields(TarStatistics))
    with query_connection() as connection:
        try:
            found = connection.execute(f"select {names} from ({statistics_query(rows, rejects)})").fetchall()
        except duckdb.Error as error:
            cause = str(error).strip().splitlines()[0]
            raise ArtifactError(f"statistics of {', '.join(rows) or 'no tar'}: {cause}; rerun ingest") from error
    return [TarStatistics(*row) for row in found]


def total(found: list[TarStatistics]) -> dict[str, Any]:
    """Sums over tars, by name of the figure; means have no sum."""
    summed = (
        "members", "rejected", "folders", "images", "buildings", "singletons", "aligned_images", "repeated_images",
        "image_mb",
    )  # fmt: skip
    return {name: sum(getattr(tar, name) for tar in found) for name in summed}


def rows_of(files: Mapping[str, Path], columns: Mapping[str, str]) -> str:
    """SQL for the rows of all files with their key as `tar`.

    Args:
        files: partition key -> parquet file.
        columns: name -> DuckDB type of those that are needed; one that a file of the earlier pipeline lacks is null.
    """
    shape = ", ".join(f"null::{kind} as {name}" for name, kind in {"tar": "varchar", **columns}.items())
    tables = [f"select {quoted(key)} as tar, * from read_parquet({quoted(str(path))})" for key, path in files.items()]
    return " union all by name ".join([f"select {shape} where false", *tables])
