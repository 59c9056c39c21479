"""Takes the pictures of one facade point: renders and encodes each view, and writes its record."""

from __future__ import annotations

import io
from dataclasses import dataclass

from spatial_core.config.sections import DemoSection
from spatial_core.demo.layout import plan_district, stream
from spatial_core.demo.records import a_line, d_line
from spatial_core.demo.scene import render
from spatial_core.demo.view import View


@dataclass(frozen=True)
class Job:
    """Pictures of one facade point.

    Args:
        district: its number in the plan, with `points` facade points.
        target: index of the facade point in the district.
        stops: panoramas of its street to take it from.
        first_patch: patch id of the first picture; the others follow.
        aligned: add an `a` line.
    """

    seed: int
    demo: DemoSection
    district: int
    points: int
    target: int
    stops: tuple[int, ...]
    first_patch: int
    aligned: bool = False


@dataclass(frozen=True)
class Shot:
    """One picture, its record, and what only the one who built the city knows.

    Args:
        building: district, street and number, joined by `/`: two facade points may be on one building.
    """

    patch_id: int
    street_view_id: int
    target_id: int
    jpeg: bytes
    text: str
    building: str
    style: str
    drive: int
    season: int
    dusk: bool


def take(job: Job) -> list[Shot]:
    """Render, develop and encode every picture of a job."""
    district = plan_district(job.seed, job.demo, job.district, job.points)
    target = district.targets[job.target]
    street = district.streets[target.street]
    building = street.buildings[target.building]
    shots = []
    for number, stop in enumerate(job.stops):
        panorama = street.panoramas[stop]
        rng = stream(job.seed, job.district, 4, target.target_id, stop)
        traffic = stream(job.seed, job.district, 5, target.street, panorama.drive)
        view = View(street, target, panorama, job.demo.image_size_px, rng, traffic)
        buffer = io.BytesIO()
        render(view).save(buffer, "JPEG", quality=view.light.quality)
        patch = job.first_patch + number
        text = d_line(district.dataset_id, patch, panorama.street_view_id, target, view.camera)
        if job.aligned:
            text += a_line(target, street.facade(building), view.camera, rng)
        shots.append(
            Shot(
                patch_id=patch,
                street_view_id=panorama.street_view_id,
                target_id=target.target_id,
                jpeg=buffer.getvalue(),
                text=text,
                building=f"{job.district}/{street.number}/{building.number}",
                style=building.look.style.name,
                drive=panorama.drive,
                season=view.light.season,
                dusk=view.light.dusk,
            )
        )
    return shots
