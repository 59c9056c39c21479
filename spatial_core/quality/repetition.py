"""Whether the same picture counts for several buildings: a wrong label if it does, and a leak between splits."""

from __future__ import annotations

import duckdb

from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactError
from spatial_core.lake.duck import query_connection
from spatial_core.lake.statistics import rows_of, tar_files
from spatial_core.quality.outcome import CheckOutcome

_SHOWN = 10


def images_unique(settings: Settings) -> CheckOutcome:
    """No image's bytes stand under two facade points, in one tar or in several.

    Only warns: the rows are sound, and whether to drop one of the tars is for a person to say. The same bytes twice
    under one facade point are counted, and no fault.

    Raises:
        ArtifactError: if a file of intermediates is damaged.
    """
    rows, _ = tar_files(settings)
    if not rows:
        return CheckOutcome("images_unique", True, "no tar is ingested yet", "warn", {"images": 0})
    tables = rows_of(rows, {"building_id": "varchar", "image_sha256": "varchar"})
    query = f"""
        with images as ({tables}), groups as (
            select image_sha256, count(*) as rows, count(distinct building_id) as buildings,
                min(building_id) as one, max(building_id) as other
            from images where image_sha256 is not null group by 1 having count(*) > 1
        )
        select (select count(*) from images), coalesce(sum(rows), 0), count(*) filter (buildings > 1),
            list(one || ' = ' || other order by one) filter (buildings > 1) from groups
    """
    with query_connection() as connection:
        try:
            images, repeated, shared, pairs = connection.execute(query).fetchall()[0]
        except duckdb.Error as error:
            raise ArtifactError(f"intermediates: {str(error).strip().splitlines()[0]}; rerun ingest") from error
    figures = {"images": images, "repeated_images": int(repeated), "shared_by_buildings": shared}
    if not shared:
        return CheckOutcome("images_unique", True, f"{images:,} images, none under two facade points", "warn", figures)
    listed = ", ".join(pairs[:_SHOWN]) + (" and more" if shared > _SHOWN else "")
    fault = f"{shared:,} images stand under two facade points or more: {listed}"
    return CheckOutcome("images_unique", False, fault, "warn", {**figures, "pairs": pairs[:_SHOWN]})
