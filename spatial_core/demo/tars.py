"""Writes one raw tar of the demo city, in one of the forms in which the real data set comes.

Of every four tars the first and last have folders `NNNN/NNNN/`, the second flat names, the third folders and `a` lines;
the last has three faults planted in it, so that the table of rejects has something to show.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spatial_core.config.sections import DemoSection
from spatial_core.config.settings import Settings
from spatial_core.demo.camera_car import Job, Shot
from spatial_core.demo.fleet import Fleet
from spatial_core.demo.layout import FIRST_DATASET, District, plan_district
from spatial_core.demo.records import stem
from spatial_core.demo.truth import Ledger, truth_row
from spatial_core.report import Progress, Report
from spatial_core.storage.atomic import atomic_file, exclusive

FIRST_PATCH = 3_000
_MTIME = 1_700_000_000
_FLAT, _ALIGNED, _DIRTY = 1, 2, 3
_FAULTS = 3
_SETTINGS = tuple(f"demo.{name}" for name in DemoSection.model_fields if name not in {"tars", "drop_images"})


@dataclass(frozen=True)
class CityTar:
    """One tar: its number in the city, and the folder it goes to."""

    number: int
    raw_dir: Path
    settings: Settings

    @property
    def district(self) -> District:
        demo = self.settings.demo
        return plan_district(self.settings.seed, demo, self.number, demo.buildings_per_tar)

    @property
    def images(self) -> int:
        """Pictures with a record, planted faults left out."""
        return sum(len(target.views) for target in self.district.targets)

    @property
    def path(self) -> Path:
        return self.raw_dir / f"{FIRST_DATASET + self.number:04d}.tar"

    def ledger(self, truth_dir: Path) -> Ledger:
        """What tells whether the tar must be written, and may be."""
        config = self.settings.pick("global.seed", *_SETTINGS) | {"number": self.number}
        return Ledger(self.path, truth_dir / f"{self.path.stem}.parquet", self.settings, config)

    def write(self, truth_dir: Path, fleet: Fleet, progress: Progress) -> Report:
        """Write the tar, unless it is there as it would be written."""
        ledger = self.ledger(truth_dir)
        with exclusive(self.path):
            if (report := ledger.unchanged()) is not None:
                return report
            ledger.require_own()
            rows: list[dict[str, Any]] = []
            jobs = self._jobs()
            with atomic_file(self.path) as temporary:
                with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for number, shots in enumerate(fleet.take_all(jobs)):
                        if number == len(self.district.targets):
                            self._plant_faults(tar, shots)
                            continue
                        for shot in shots:
                            name = self._member(shot)
                            _add(tar, f"{name}.jpg", shot.jpeg)
                            _add(tar, f"{name}.txt", shot.text.encode())
                            building_id = f"{self.district.dataset_id:04d}_{shot.target_id}"
                            row = truth_row(
                                shot, file=f"{name}.jpg", row=len(rows), building_id=building_id, osmid=None
                            )
                            rows.append(row)
                        progress(len(rows), self.images, self.path.name)
                return ledger.close(temporary, rows, _FAULTS if len(jobs) > len(self.district.targets) else 0)

    def _jobs(self) -> list[Job]:
        """One job a facade point; in a tar with faults one more, of pictures to spoil."""
        aligned = self.number % 4 == _ALIGNED
        jobs: list[Job] = []
        patch = FIRST_PATCH
        for index, target in enumerate(self.district.targets):
            jobs.append(self._job(index, target.views, patch, aligned))
            patch += len(target.views)
        rich = [index for index, target in enumerate(self.district.targets) if len(target.spare) >= _FAULTS]
        if self.number % 4 == _DIRTY and rich:
            jobs.append(self._job(rich[0], self.district.targets[rich[0]].spare[:_FAULTS], patch, aligned))
        return jobs

    def _job(self, target: int, stops: tuple[int, ...], patch: int, aligned: bool) -> Job:
        demo = self.settings.demo
        return Job(
            seed=self.settings.seed,
            demo=demo,
            district=self.number,
            points=demo.buildings_per_tar,
            target=target,
            stops=stops,
            first_patch=patch,
            aligned=aligned,
        )

    def _member(self, shot: Shot) -> str:
        dataset = self.district.dataset_id
        name = stem(dataset, shot.target_id, shot.patch_id, shot.street_view_id)
        return name if self.number % 4 == _FLAT else f"{dataset:04d}/{dataset:04d}/{name}"

    def _plant_faults(self, tar: tarfile.TarFile, shots: list[Shot]) -> None:
        """What real tars have too: an empty record, a picture without record, a picture that was cut short."""
        empty, orphan, cut = shots
        _add(tar, f"{self._member(empty)}.jpg", empty.jpeg)
        _add(tar, f"{self._member(empty)}.txt", b"")
        _add(tar, f"{self._member(orphan)}.jpg", orphan.jpeg)
        _add(tar, f"{self._member(cut)}.jpg", cut.jpeg[: len(cut.jpeg) * 3 // 5])
        _add(tar, f"{self._member(cut)}.txt", cut.text.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), _MTIME, 0o644
    tar.addfile(info, io.BytesIO(data))
