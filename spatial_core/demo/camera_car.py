"""Takes the pictures: renders and encodes the views of one facade point, and spreads facade points over processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from types import TracebackType
from typing import Self

from spatial_core.config.sections import DemoSection
from spatial_core.demo.layout import plan_district, stream
from spatial_core.demo.records import a_line, d_line
from spatial_core.demo.scene import render
from spatial_core.demo.view import View
from spatial_core.storage.hardware import usable_cores

_AHEAD = 4
_WORTH_PROCESSES = 32


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


class CameraCars:
    """Takes pictures on all usable cores. Its processes start with the first large list of jobs and end with the block.

    Starting a process imports the calling program anew, which is why one set of them serves a whole city.
    """

    def __init__(self) -> None:
        self._cores = usable_cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def take_all(self, jobs: Sequence[Job]) -> Iterator[list[Shot]]:
        """`take` every job, in order, with a bounded number of jobs waiting to be collected."""
        if self._pool is None and (self._cores == 1 or len(jobs) < _WORTH_PROCESSES):
            yield from map(take, jobs)
            return
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._cores, mp_context=context, initializer=_end_with_parent)
        queue = iter(jobs)
        running: deque[Future[list[Shot]]] = deque()
        for job in islice(queue, _AHEAD * self._cores):
            running.append(self._pool.submit(take, job))
        while running:
            yield running.popleft().result()
            for job in islice(queue, 1):
                running.append(self._pool.submit(take, job))


def _end_with_parent() -> None:
    """A pool's process waits for work for ever when its parent is killed; this makes it leave."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
