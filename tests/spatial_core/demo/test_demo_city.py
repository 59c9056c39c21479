"""The files of the demo city: same seed, same bytes; true records; readable by our own strict stages."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_core.config.sections import DemoSection
from spatial_core.config.settings import Settings
from spatial_core.demo import truth
from spatial_core.demo.camera_car import Job, take
from spatial_core.demo.city import DROP_NAME, write_city
from spatial_core.demo.fleet import Fleet
from spatial_core.demo.layout import plan_district
from spatial_core.errors import ArtifactBusy, InputError, StageFailed
from spatial_core.images.decode import decode_jpeg
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.street_view.ingest import ingest_tar
from spatial_core.street_view.metadata import parse_metadata

DEMO = DemoSection(tars=4, buildings_per_tar=5, max_views=3, image_size_px=96, drop_images=8)
SETTINGS = Settings(demo=DEMO)
TARS = ["0901.tar", "0902.tar", "0903.tar", "0904.tar"]


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("city")
    return folder, write_city(output_dir=folder, settings=SETTINGS)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that is neither a lock nor a manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.parent.name != "_manifests"
    }


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as archive:
        return {info.name: archive.extractfile(info).read() for info in archive}  # type: ignore[union-attr]


def test_same_seed_same_bytes_and_another_seed_others(city: tuple[Path, Report], tmp_path: Path) -> None:
    folder, _ = city
    write_city(output_dir=tmp_path / "again", settings=SETTINGS)
    write_city(output_dir=tmp_path / "other", settings=Settings.model_validate({"global": {"seed": 1}, "demo": DEMO}))
    first, again, other = digests(folder), digests(tmp_path / "again"), digests(tmp_path / "other")

    assert first == again
    assert first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())


def test_the_report_counts_what_lies_there(city: tuple[Path, Report]) -> None:
    folder, report = city
    texts = [text for tar in TARS for text in members(folder / "raw" / tar).values() if text.startswith(b"d ")]

    assert report.rows == report.kept == len(texts) - 1, "the truncated picture has a record too"
    assert report.details["tars"] == len(TARS)
    assert report.details["facade_points"] == 4 * 5
    assert report.details["drop_rows"] == pq.read_metadata(folder / "drops" / DROP_NAME).num_rows
    assert [path.name for path in sorted((folder / "raw").iterdir()) if not path.name.startswith(".")] == TARS


def test_nothing_is_written_twice_and_what_is_missing_or_of_other_settings_is_written_again(
    city: tuple[Path, Report], tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(city[0], folder, copy_function=shutil.copy2)
    before = digests(folder)
    untouched = (folder / "raw" / "0901.tar").stat().st_ino

    assert write_city(output_dir=folder, settings=SETTINGS).up_to_date
    (folder / "raw" / "0902.tar").unlink()
    (folder / "demo_truth" / "0903.parquet").unlink()
    assert not write_city(output_dir=folder, settings=SETTINGS).up_to_date
    assert digests(folder) == before
    assert (folder / "raw" / "0901.tar").stat().st_ino == untouched
    other = Settings.model_validate({"global": {"seed": 1}, "demo": DEMO})
    assert not write_city(output_dir=folder, settings=other).up_to_date
    assert not set(digests(folder).values()) & set(before.values())


@pytest.mark.parametrize("name", ["raw/0902.tar", f"drops/{DROP_NAME}", "demo_truth/0902.parquet"])
def test_files_of_others_are_left_alone_and_nothing_is_drawn(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(b"a tar of the real data set")
    with pytest.raises(InputError, match=f"{name}: .* would be overwritten; move it away"):
        write_city(output_dir=tmp_path, settings=SETTINGS)
    assert list(digests(tmp_path)) == [name]
    assert (tmp_path / name).read_bytes() == b"a tar of the real data set"


def test_a_tar_that_took_the_place_of_a_drawn_one_is_left_alone(city: tuple[Path, Report], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(city[0], folder, copy_function=shutil.copy2)
    tar = folder / "raw" / "0903.tar"
    shutil.copyfile(folder / "raw" / "0901.tar", tar)
    before = digests(folder)
    with pytest.raises(InputError, match=r"0903\.tar: was not drawn by `demo-data`, or was changed since"):
        write_city(output_dir=folder, settings=SETTINGS)
    assert digests(folder) == before
    tar.unlink()
    write_city(output_dir=folder, settings=SETTINGS)
    assert digests(folder) == digests(city[0])


@pytest.mark.parametrize("at", ["tar", "drop"])
@pytest.mark.parametrize("moment", ["before the record", "after the record"])
def test_a_run_that_broke_off_at_its_record_is_drawn_again(
    at: str, moment: str, city: tuple[Path, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = DEMO.model_copy(update={"tars": 1, "drop_images": 3})
    write_city(output_dir=tmp_path, settings=Settings.model_validate({"global": {"seed": 1}, "demo": few}))
    record, broken = truth.record_artifact, "0901.parquet" if at == "tar" else DROP_NAME

    def break_off(artifact: Path, *arguments: Any) -> None:
        if artifact.name == broken and moment == "before the record":
            raise KeyboardInterrupt
        record(artifact, *arguments)
        if artifact.name == broken:
            raise KeyboardInterrupt

    monkeypatch.setattr(truth, "record_artifact", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_city(output_dir=tmp_path, settings=Settings(demo=few))
    monkeypatch.undo()
    write_city(output_dir=tmp_path, settings=Settings(demo=few))
    assert digests(tmp_path)["raw/0901.tar"] == digests(city[0])["raw/0901.tar"]
    assert write_city(output_dir=tmp_path, settings=Settings(demo=few)).up_to_date


def test_more_tars_leave_the_first_ones_alone(city: tuple[Path, Report], tmp_path: Path) -> None:
    demo = DEMO.model_copy(update={"tars": 2, "drop_images": 3})
    write_city(output_dir=tmp_path, settings=Settings(demo=demo))
    few, many = digests(tmp_path), digests(city[0])

    assert [few[f"raw/{tar}"] == many[f"raw/{tar}"] for tar in TARS[:2]] == [True, True]
    assert few[f"drops/{DROP_NAME}"] != many[f"drops/{DROP_NAME}"]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with exclusive(tmp_path / "demo_truth"), pytest.raises(ArtifactBusy, match="another process"):
        write_city(output_dir=tmp_path, settings=SETTINGS)


def test_both_namings_and_both_releases_occur(city: tuple[Path, Report]) -> None:
    names = {tar: list(members(city[0] / "raw" / tar)) for tar in TARS}

    assert all("/" not in name for name in names["0902.tar"])
    for tar in ("0901.tar", "0903.tar", "0904.tar"):
        assert all(name.startswith(f"{tar[:4]}/{tar[:4]}/{tar[:4]}_") for name in names[tar])
    aligned = {tar: sum(b"\na " in data for data in members(city[0] / "raw" / tar).values()) for tar in TARS}
    assert [tar for tar, count in aligned.items() if count] == ["0903.tar"]
    assert aligned["0903.tar"] == len(names["0903.tar"]) // 2


def test_names_carry_the_ids_of_the_record(city: tuple[Path, Report]) -> None:
    for name, data in members(city[0] / "raw" / "0901.tar").items():
        if name.endswith(".txt"):
            dataset, target, patch, street_view = (int(part) for part in data.split()[1:5])
            assert Path(name).stem == f"{dataset:04d}_{patch:07d}_{street_view:07d}_{target:07d}"


def test_records_agree_with_geodesy(city: tuple[Path, Report]) -> None:
    """Distance, heading and pitch recomputed from the coordinates by great-circle formulas."""
    for tar in TARS[:3]:
        for data in members(city[0] / "raw" / tar).values():
            if not data.startswith(b"d "):
                continue
            numbers = [float(part) for part in data.splitlines()[0].split()[1:]]
            lat, lon, height, nx, ny, nz, car_lat, car_lon, car_height, distance, heading, pitch, roll = numbers[4:]
            p1, p2, dl = math.radians(car_lat), math.radians(lat), math.radians(lon - car_lon)
            chord = math.sin((p2 - p1) / 2) ** 2 + math.cos(p1) * math.cos(p2) * math.sin(dl / 2) ** 2
            ground = 2 * 6_371_008.8 * math.asin(math.sqrt(chord))
            y = math.sin(dl) * math.cos(p2)
            x = math.cos(p1) * math.sin(p2) - math.sin(p1) * math.cos(p2) * math.cos(dl)
            bearing = math.degrees(math.atan2(y, x)) % 360
            assert distance == pytest.approx(math.hypot(ground, height - car_height), abs=0.02)
            assert abs((heading - bearing + 180) % 360 - 180) < 0.05
            assert pitch == pytest.approx(math.degrees(math.atan2(height - car_height, ground)), abs=0.05)
            assert roll == 0
            assert math.hypot(nx, ny, nz) == pytest.approx(1, abs=1e-5)
            assert nx * math.sin(math.radians(heading)) + ny * math.cos(math.radians(heading)) < -0.4


def test_the_strict_reader_keeps_all_but_the_planted_faults(city: tuple[Path, Report], tmp_path: Path) -> None:
    reports = {tar: ingest_tar(city[0] / "raw" / tar, tmp_path, SETTINGS) for tar in TARS}

    assert [dict(report.rejected) for report in reports.values()][:3] == [{}, {}, {}]
    assert dict(reports["0904.tar"].rejected) == {
        "text_empty": 1,
        "image_corrupt": 1,
        "orphan_image": 1,
        "partner_rejected": 2,
    }
    assert sum(report.rows for report in reports.values()) == city[1].rows
    assert reports["0903.tar"].details["alignment"] == {"present": reports["0903.tar"].rows}


def test_our_parser_reads_the_alignment(city: tuple[Path, Report]) -> None:
    data = next(data for data in members(city[0] / "raw" / "0903.tar").values() if data.startswith(b"d "))
    energy, inliers, similarity, distortion = parse_metadata(data, 903).alignment
    numbers = [float(part) for part in data.splitlines()[1].split()[1:]]

    assert [energy, inliers, similarity, distortion] == numbers[28:32]
    assert len(numbers) == 40
    warp = np.array(numbers[2:11]).reshape(3, 3)
    corner = warp @ (numbers[11], numbers[12], 1)
    other = warp @ (numbers[13], numbers[14], 1)
    assert np.hypot(*(corner[:2] / corner[2] - other[:2] / other[2])) == pytest.approx(10, abs=0.05)


def test_the_drop_has_seen_and_unseen_buildings(city: tuple[Path, Report]) -> None:
    drop = pq.read_table(city[0] / "drops" / DROP_NAME)
    truth = pq.read_table(city[0] / "demo_truth" / DROP_NAME).to_pandas()

    assert drop.schema.names == ["image_bytes", "OSMID", "is_valid"]
    assert drop["OSMID"].to_pylist() == truth.osmid.to_list()
    assert truth.groupby("osmid").physical_building.nunique().max() == 1
    assert truth.building_id.isna().any()
    assert truth.building_id.notna().any()
    for data in drop["image_bytes"].to_pylist():
        assert decode_jpeg(data).shape == (96, 96, 3)
    in_tars = {data for tar in TARS for data in members(city[0] / "raw" / tar).values()}
    assert not in_tars & set(drop["image_bytes"].to_pylist())


def test_processes_take_the_same_pictures_in_the_same_order() -> None:
    plan = plan_district(0, DEMO, 0, 40)
    jobs = [Job(0, DEMO, 0, 40, index, target.views[:1], 1) for index, target in enumerate(plan.targets)]

    with Fleet() as fleet:
        assert list(fleet.take_all(jobs)) == [take(job) for job in jobs]


def test_a_camera_car_that_dies_fails_the_stage_and_ends_the_others() -> None:
    missing = Job(0, DEMO, 0, 40, target=10_000, stops=(0,), first_patch=1)

    with Fleet() as fleet, pytest.raises(StageFailed, match="exit code 1"):
        list(fleet.take_all([missing] * 40))
    assert not any(car.poll() is None for car in fleet._cars)


def test_camera_cars_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """A script without a `__main__` guard writes a city and is killed; nothing half-written is visible."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from spatial_core.config.settings import Settings\n"
        "from spatial_core.demo.city import write_city\n"
        "settings = Settings(demo={'tars': 1, 'buildings_per_tar': 200, 'image_size_px': 64})\n"
        f"write_city(output_dir=Path({str(tmp_path / 'city')!r}), settings=settings)\n"
    )
    writer = subprocess.Popen([sys.executable, str(script)])
    parent = psutil.Process(writer.pid)
    deadline = time.monotonic() + 60
    cars: list[psutil.Process] = []
    while not cars and time.monotonic() < deadline:
        time.sleep(0.05)
        cars = parent.children()
    writer.kill()
    writer.wait()

    assert cars
    _, alive = psutil.wait_procs(cars, timeout=60)
    assert not alive
    assert not list((tmp_path / "city" / "raw").glob("[0-9]*.tar"))


def test_buildings_of_one_style_look_more_alike_than_others() -> None:
    """Distances of 16x16 fingerprints between different buildings, over all pairs."""
    plan = plan_district(42, DEMO, 0, 48)
    styles, prints = [], []
    for index, target in enumerate(plan.targets):
        for shot in take(Job(42, DEMO, 0, 48, index, target.views[:2], 1)):
            small = Image.open(io.BytesIO(shot.jpeg)).resize((16, 16), Image.Resampling.BILINEAR)
            prints.append((index, np.asarray(small, float).ravel()))
            styles.append(shot.style)
    alike, unlike = [], []
    for i, j in itertools.combinations(range(len(prints)), 2):
        if prints[i][0] != prints[j][0]:
            gap = float(np.linalg.norm(prints[i][1] - prints[j][1]))
            (alike if styles[i] == styles[j] else unlike).append(gap)

    assert len(set(styles)) >= 4
    assert np.mean(alike) < 0.93 * np.mean(unlike)


def test_view_counts_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="min_views 5 is above max_views 3"):
        DemoSection(min_views=5, max_views=3)
