"""The two real tars: against their published labels, and against a plain reading with tarfile and Pillow."""

from __future__ import annotations

import csv
import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spatial_core.config.settings import Settings
from spatial_core.errors import TarError
from spatial_core.images.byte_ranges import TarImages
from spatial_core.images.decode import decode_jpeg
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_tars import DAMAGES

pytestmark = pytest.mark.real_data
TARS = {"0201": (21, 7), "0202": (39, 18)}


@pytest.mark.parametrize("number", TARS)
def test_rows_agree_with_the_labels_and_with_a_plain_reading(real_data: Path, tmp_path: Path, number: str) -> None:
    tar = real_data / f"buildings/{number}.tar"
    report = ingest_tar(tar, tmp_path, Settings())
    images, targets = TARS[number]
    assert (report.rows, report.rows_in, report.kept, dict(report.rejected)) == (images, 2 * images, 2 * images, {})
    assert report.details["buildings"] == targets
    assert report.details["tar"]["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert pq.read_table(tmp_path / f"{number}_rejects.parquet").num_rows == 0
    rows = pq.read_table(tmp_path / f"{number}.parquet").to_pylist()

    with (real_data / "buildings/labels.csv").open() as handle:
        labels = {line["stem"]: line for line in csv.DictReader(handle) if line["tar"] == tar.name}
    assert {Path(row["image_path"]).stem for row in rows} == set(labels)
    for row in rows:
        label = labels[Path(row["image_path"]).stem]
        for name in ("dataset_id", "target_id", "patch_id", "street_view_id"):
            assert row[name] == int(label[name])
        assert row["building_id"] == label["building_id"]
        assert row["image_sha256"] == label["jpg_sha256"]
        assert row["target_lat"] == pytest.approx(float(label["target_lat"]), abs=1e-6)
        assert row["target_lon"] == pytest.approx(float(label["target_lon"]), abs=1e-6)

    with tarfile.open(tar) as archive, TarImages(tar) as bytes_of:
        for row in rows:
            data = archive.extractfile(row["image_path"]).read()  # type: ignore[union-attr]
            assert bytes_of.verified(row["image_offset"], row["image_bytes"], row["image_sha256"]) == data
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.int16)
            assert (row["image_height"], row["image_width"]) == pixels.shape[:2]
            assert np.abs(decode_jpeg(data).astype(np.int16) - pixels).max() <= 1
            text = archive.extractfile(row["image_path"].replace(".jpg", ".txt")).read()  # type: ignore[union-attr]
            values = [float(token) for token in text.decode().split("\n")[0].split()[1:]]
            names = pq.read_schema(tmp_path / f"{number}.parquet").names
            measured = [row[name] for name in [*names[4:6], *names[10:21]]]
            assert measured == values[4:]
            assert (row["target_height_m"], row["distance_m"], row["roll_deg"]) == (values[6], values[13], values[16])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_copies_are_refused(real_data: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "0201.tar"
    copy.write_bytes(DAMAGES[damage]((real_data / "buildings/0201.tar").read_bytes()))
    with pytest.raises(TarError, match=r"0201\.tar: byte \d+: "):
        ingest_tar(copy, tmp_path / "out", Settings())
    assert not list((tmp_path / "out").glob("*.parquet"))
