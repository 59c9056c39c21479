"""Fingerprints against Pillow one by one, and against everything that can have changed since ingest."""

from __future__ import annotations

import hashlib
import io
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import ArtifactBusy, ArtifactError, DigestMismatch, InputError, TarError
from spatial_core.quality.checks import fingerprints_sound
from spatial_core.report import Report
from spatial_core.storage.atomic import exclusive
from spatial_core.storage.parquet import read_provenance, vectors_to_numpy
from spatial_core.storage.provenance import artifact_digest, verify_artifact
from spatial_core.street_view import fingerprints
from spatial_core.street_view.fingerprints import fingerprint_tar
from spatial_core.street_view.ingest import ingest_tar
from tests.data.make_tars import pillow_image, street_view, tar_bytes

Mode = Literal["exact", "scaled"]
NAME: Final = "0101_fingerprints.parquet"
# (height, width): square, wide, tall, odd, as small as the fingerprint, smaller, and a photograph's size.
SIZES: Final = ((64, 64), (90, 400), (700, 60), (123, 77), (16, 16), (9, 13), (640, 640))


def facade(rng: np.random.Generator, height: int, width: int, colorspace: str = "RGB") -> bytes:
    """A JPEG with edges, a gradient and noise."""
    y, x = np.mgrid[0:height, 0:width]
    windows = ((x // rng.integers(5, 40)) % 2) & ((y // rng.integers(5, 40)) % 2)
    wall, glass = rng.integers(0, 256, (2, 3))
    light = 60 * np.sin(x / width * 3 + y / height)
    pixels = np.where(windows[..., None], glass, wall) + light[..., None] + rng.normal(0, 6, (height, width, 3))
    array = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8)[..., : 1 if colorspace == "GRAY" else 3])
    encoded: bytes = simplejpeg.encode_jpeg(array, 80, colorspace, "420")
    return encoded


def write_tar(path: Path, pictures: list[bytes]) -> Path:
    """A tar whose images are `pictures`, in this order."""
    entries = street_view(int(path.stem), seed=1, targets=len(pictures))[: 2 * len(pictures)]
    for place, data in enumerate(pictures):
        entries[2 * place] = replace(entries[2 * place], data=data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(entries))
    return path


def configured(threads: int = 2, image_size: int = 16, mode: Mode = "exact") -> Settings:
    return Settings(
        infrastructure={"threads": threads},
        fingerprints={"image_size": image_size, "decode": mode},
    )


def matrix_of(path: Path) -> npt.NDArray[np.uint8]:
    return vectors_to_numpy(pq.read_table(path)["fingerprint"])


def by_pillow(pictures: list[bytes], size: int = 16) -> npt.NDArray[np.uint8]:
    """One picture after another, decoded and resized by Pillow: (N, size^2 x 3) uint8."""
    return np.stack(
        [
            np.asarray(
                Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            ).reshape(-1)
            for data in pictures
        ]
    )


def differences(ours: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype == np.uint8
    return np.abs(ours.astype(np.int16) - reference.astype(np.int16))


def neighbour_agreement(ours: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8], neighbours: int) -> float:
    """Share of each row's nearest rows, itself left out, that both matrices agree on."""
    found = []
    for matrix in (ours.astype(np.float64), reference.astype(np.float64)):
        distances = ((matrix[:, None] - matrix[None]) ** 2).sum(2)
        np.fill_diagonal(distances, np.inf)
        found.append(np.argsort(distances, axis=1, kind="stable")[:, :neighbours])
    shared = [len(set(a) & set(b)) for a, b in zip(*found, strict=True)]
    return float(np.mean(shared)) / neighbours


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    rng = np.random.default_rng(5)
    colour = [facade(rng, *SIZES[place % len(SIZES)]) for place in range(40)]
    return [*colour, facade(rng, 200, 300, "GRAY"), pillow_image("L", (50, 60), "JPEG", progressive=True)]


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory, pictures: list[bytes]) -> tuple[Path, Path]:
    """A tar and its intermediates; tests that change either copy it first."""
    folder = tmp_path_factory.mktemp("ingested")
    tar = write_tar(folder / "raw/0101.tar", pictures)
    ingest_tar(tar, folder / "intermediates", Settings())
    return tar, folder / "intermediates/0101.parquet"


def visible(folder: Path) -> list[str]:
    """Files a reader of the folder could take for artifacts."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def altered(path: Path, table: pa.Table) -> Path:
    """Intermediates of another making, which no manifest vouches for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def test_rows_and_report(tmp_path: Path, ingested: tuple[Path, Path], pictures: list[bytes]) -> None:
    tar, intermediates = ingested
    seen: list[tuple[int, int | None]] = []
    report = fingerprint_tar(
        tar, intermediates, tmp_path, configured(), lambda done, total, _: seen.append((done, total))
    )
    rows = len(pictures)
    assert report.artifact == tmp_path / NAME
    assert (report.stage, report.rows, report.rows_in, report.kept, dict(report.rejected)) == (
        "fingerprint",
        *(rows, rows, rows),
        {},
    )
    assert (report.details["decode"], report.details["image_size"]) == ("exact", 16)
    assert report.details["images_per_s"] > 0
    assert seen[-1] == (rows, rows)
    table = pq.read_table(report.artifact)
    assert table.schema.equals(schemas.fingerprints(16))
    assert [table.schema.field(name).nullable for name in table.schema.names].count(True) == 4
    assert table.drop_columns("fingerprint").equals(pq.read_table(intermediates).select(schemas.INTERMEDIATES.names))
    assert fingerprints_sound(report.artifact).passed
    verify_artifact(report.artifact)
    provenance = read_provenance(report.artifact)
    assert provenance is not None
    assert provenance.inputs == {"intermediates": artifact_digest(intermediates)}
    assert provenance.config == {"fingerprints": {"image_size": 16, "decode": "exact"}}


@pytest.mark.parametrize("size", [16, 8, 5, 24])
def test_exact_is_within_a_grey_level_of_pillow(
    tmp_path: Path, ingested: tuple[Path, Path], pictures: list[bytes], size: int
) -> None:
    report = fingerprint_tar(*ingested, tmp_path, configured(image_size=size))
    difference = differences(matrix_of(report.artifact), by_pillow(pictures, size))
    assert np.mean(difference <= 1) >= 0.999
    assert difference.max() <= 2


def test_scaled_is_near_and_finds_the_same_neighbours(
    tmp_path: Path, ingested: tuple[Path, Path], pictures: list[bytes]
) -> None:
    report = fingerprint_tar(*ingested, tmp_path, configured(mode="scaled"))
    assert report.details["decode"] == "scaled"
    ours, reference = matrix_of(report.artifact), by_pillow(pictures)
    assert differences(ours, reference).mean() < 0.5
    assert neighbour_agreement(ours, reference, 10) >= 0.98
    large = [place for place, data in enumerate(pictures) if max(Image.open(io.BytesIO(data)).size) == 640]
    assert differences(ours[large], reference[large]).any()  # it did decode at another scale


def test_a_grid_of_sixteen_colours_comes_back_in_its_places(tmp_path: Path) -> None:
    """Blocks of one colour each: row-major, height before width, red before green before blue."""
    colours = np.random.default_rng(3).integers(20, 236, (16, 16, 3)).astype(np.uint8)
    pixels = np.ascontiguousarray(np.kron(colours, np.ones((40, 40, 1), np.uint8)))
    data = simplejpeg.encode_jpeg(pixels, 100, "RGB", "444")
    tar = write_tar(tmp_path / "0101.tar", [data])
    ingest_tar(tar, tmp_path, Settings())
    found = matrix_of(fingerprint_tar(tar, tmp_path / "0101.parquet", tmp_path, configured()).artifact)
    # The triangle filter reaches half a block into each neighbour: 1/8, 3/4, 1/8 along an axis.
    padded = np.pad(colours.astype(np.float64), ((1, 1), (1, 1), (0, 0)), "constant", constant_values=np.nan)
    weights = np.outer([1, 6, 1], [1, 6, 1]) / 64.0
    expected = sum(weights[i, j] * padded[i : i + 16, j : j + 16] for i in range(3) for j in range(3))
    inner = (slice(1, 15), slice(1, 15))
    assert np.abs(found.reshape(16, 16, 3)[inner] - expected[inner]).max() < 3


def test_groups_slices_and_threads_change_nothing(
    tmp_path: Path, ingested: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def content(folder: str, threads: int) -> bytes:
        return fingerprint_tar(*ingested, tmp_path / folder, configured(threads)).artifact.read_bytes()

    usual = content("usual", 2)
    assert content("one", 1) == content("many", 7) == content("all", 0) == usual
    monkeypatch.setattr(fingerprints, "_SLICE_ROWS", 3)
    assert content("slices", 2) == usual
    monkeypatch.setattr(fingerprints, "_GROUP_ROWS", 16)
    content("groups", 2)
    assert pq.ParquetFile(tmp_path / "groups" / NAME).metadata.num_row_groups == 3
    assert pq.read_table(tmp_path / "groups" / NAME).equals(pq.read_table(tmp_path / "usual" / NAME))


def test_rows_keep_the_order_of_the_intermediates(
    tmp_path: Path, ingested: tuple[Path, Path], pictures: list[bytes]
) -> None:
    tar, intermediates = ingested
    order = np.random.default_rng(8).permutation(len(pictures))
    shuffled = altered(tmp_path / "0101.parquet", pq.read_table(intermediates).take(pa.array(order)))
    report = fingerprint_tar(tar, shuffled, tmp_path / "out", configured())
    assert pq.read_table(report.artifact)["patch_id"].equals(pq.read_table(shuffled)["patch_id"])
    plain = fingerprint_tar(tar, intermediates, tmp_path / "plain", configured())
    assert np.array_equal(matrix_of(report.artifact), matrix_of(plain.artifact)[order])


def test_done_once(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    first = fingerprint_tar(*ingested, tmp_path, configured())
    stamp = first.artifact.stat().st_mtime_ns
    again = fingerprint_tar(*ingested, tmp_path, configured(threads=1))
    assert (first.up_to_date, again.up_to_date, again.rows) == (False, True, first.rows)
    assert first.artifact.stat().st_mtime_ns == stamp


def test_made_again_when_something_changed(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    tar, intermediates = ingested
    copy = altered(tmp_path / "in/0101.parquet", pq.read_table(intermediates))
    out = tmp_path / "out"

    def run(**settings: Any) -> Report:
        return fingerprint_tar(tar, copy, out, configured(**settings))

    exact = run().artifact.read_bytes()
    assert not run(mode="scaled").up_to_date
    assert not run(image_size=8).up_to_date
    assert not run().up_to_date
    assert (out / NAME).read_bytes() == exact
    (out / NAME).write_bytes(exact[:-9] + b"?" + exact[-8:])
    assert not run().up_to_date
    assert (out / NAME).read_bytes() == exact
    altered(copy, pq.read_table(intermediates).slice(0, 7))
    assert (run().rows, run().up_to_date) == (7, True)


CHILD = """
import os, signal, sys
from pathlib import Path
import spatial_core.street_view.fingerprints as fingerprints
from spatial_core.config.settings import Settings

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

moment, tar, intermediates, out = sys.argv[1:]
fingerprints._GROUP_ROWS, fingerprints._SLICE_ROWS = 16, 4
progress = lambda *_: None
if moment == "while_reading":
    progress = lambda done, *_: done > 24 and die()
elif moment == "before_the_manifest":
    fingerprints.record_artifact = die
fingerprints.fingerprint_tar(
    Path(tar), Path(intermediates), Path(out), Settings(infrastructure={"threads": 2}), progress
)
"""


@pytest.mark.parametrize(("moment", "seen"), [("while_reading", []), ("before_the_manifest", [NAME])])
def test_killed_and_run_again(
    tmp_path: Path, ingested: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, moment: str, seen: list[str]
) -> None:
    monkeypatch.setattr(fingerprints, "_GROUP_ROWS", 16)
    undisturbed = fingerprint_tar(*ingested, tmp_path / "undisturbed", configured()).artifact.read_bytes()
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, moment, *map(str, ingested), str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert visible(out) == seen
    assert all((out / name).read_bytes() == undisturbed for name in seen)
    assert not fingerprint_tar(*ingested, out, configured()).up_to_date
    assert (out / NAME).read_bytes() == undisturbed
    assert not list(out.glob(".*.partial*"))
    assert fingerprint_tar(*ingested, out, configured()).up_to_date


def test_another_writer_is_not_disturbed(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    with exclusive(tmp_path / NAME), pytest.raises(ArtifactBusy, match=NAME):
        fingerprint_tar(*ingested, tmp_path, configured())


@pytest.mark.parametrize("place", [0, 17, 41])
@pytest.mark.parametrize("mode", ["exact", "scaled"])
def test_a_flipped_bit_in_an_image_is_found(
    tmp_path: Path, ingested: tuple[Path, Path], place: int, mode: Mode
) -> None:
    tar, intermediates = ingested
    row = pq.read_table(intermediates).slice(place, 1).to_pylist()[0]
    data = bytearray(tar.read_bytes())
    data[row["image_offset"] + row["image_bytes"] // 2] ^= 1
    damaged = tmp_path / "0101.tar"
    damaged.write_bytes(data)
    with pytest.raises(DigestMismatch, match=rf"0101\.tar: byte {row['image_offset']}: .* rerun ingest"):
        fingerprint_tar(damaged, intermediates, tmp_path / "out", configured(mode=mode))
    assert visible(tmp_path / "out") == []


def test_the_first_damaged_image_is_named_whatever_the_threads_do(
    tmp_path: Path, ingested: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprints, "_SLICE_ROWS", 2)
    tar, intermediates = ingested
    offsets = pq.read_table(intermediates)["image_offset"].to_pylist()
    data = bytearray(tar.read_bytes())
    for place in (9, 10, 30):
        data[offsets[place] + 40] ^= 1
    damaged = tmp_path / "0101.tar"
    damaged.write_bytes(data)
    with pytest.raises(DigestMismatch, match=f"byte {offsets[9]}: "):
        fingerprint_tar(damaged, intermediates, tmp_path / "out", configured(threads=5))


def test_an_image_that_no_longer_decodes(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    """Bytes as recorded, yet not acceptable: intermediates of a more lenient reader."""
    tar, intermediates = ingested
    data = bytearray(tar.read_bytes())
    rows = pq.read_table(intermediates).to_pylist()
    start, length = rows[3]["image_offset"], rows[3]["image_bytes"]
    data[start + length // 2 : start + length] = bytes(length - length // 2)
    rows[3]["image_sha256"] = hashlib.sha256(data[start : start + length]).hexdigest()
    damaged = tmp_path / "0101.tar"
    damaged.write_bytes(data)
    believed = altered(tmp_path / "in/0101.parquet", pa.Table.from_pylist(rows, schemas.INTERMEDIATES))
    with pytest.raises(ArtifactError, match=rf"0101\.tar: byte {start}: .*image_corrupt.*rerun ingest"):
        fingerprint_tar(damaged, believed, tmp_path / "out", configured())
    assert visible(tmp_path / "out") == []


def test_a_tar_that_is_cut_missing_or_another(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    tar, intermediates = ingested
    out = tmp_path / "out"
    cut = tmp_path / "0101.tar"
    cut.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    with pytest.raises(TarError, match=r"0101\.tar: byte \d+: "):
        fingerprint_tar(cut, intermediates, out, configured())
    with pytest.raises(InputError, match=r"nowhere/0101\.tar: cannot be opened"):
        fingerprint_tar(tmp_path / "nowhere/0101.tar", intermediates, out, configured())
    other = tmp_path / "0102.tar"
    other.write_bytes(tar.read_bytes())
    renamed = altered(tmp_path / "in/0102.parquet", pq.read_table(intermediates))
    with pytest.raises(InputError, match=r"0102\.parquet: rows of '0101\.tar', but the tar given is .*0102\.tar"):
        fingerprint_tar(other, renamed, out, configured())
    assert visible(out) == []


def test_intermediates_that_cannot_be_used(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    tar, intermediates = ingested
    table = pq.read_table(intermediates)
    out = tmp_path / "out"

    def run(changed: pa.Table) -> None:
        fingerprint_tar(tar, altered(tmp_path / "in/0101.parquet", changed), out, configured())

    with pytest.raises(InputError, match=r"0101\.parquet: no rows.*rerun ingest on 0101\.tar"):
        run(table.slice(0, 0))
    with pytest.raises(InputError, match=r"0101\.parquet: missing column image_offset, image_sha256"):
        run(table.drop_columns(["image_offset", "image_sha256"]))
    widths = table.schema.get_field_index("image_width")
    with pytest.raises(ArtifactError, match=r"image_width is int64, expected int32"):
        run(table.set_column(widths, "image_width", table["image_width"].cast(pa.int64())))
    nulls = pa.array([None, *table["image_sha256"].to_pylist()[1:]], pa.string())
    digests = table.schema.get_field_index("image_sha256")
    with pytest.raises(ArtifactError, match=r"0101\.parquet: column image_sha256 is null in 1 rows"):
        run(table.set_column(digests, "image_sha256", nulls))
    names = pa.array(["0102.tar", *table["tar_file"].to_pylist()[1:]], pa.string())
    mixed = table.set_column(table.schema.get_field_index("tar_file"), "tar_file", names)
    with pytest.raises(InputError, match=r"rows of '0102\.tar'"):
        run(mixed)
    with pytest.raises(InputError, match=r"nowhere/0101\.parquet: no such file"):
        fingerprint_tar(tar, tmp_path / "nowhere/0101.parquet", out, configured())
    embeddings = altered(tmp_path / "in/0101_embeddings.parquet", table)
    with pytest.raises(
        InputError, match=r"0101_embeddings\.parquet: expected 0101\.parquet, which ingest makes of 0101"
    ):
        fingerprint_tar(tar, embeddings, out, configured())
    assert visible(out) == []


def test_intermediates_that_were_damaged_after_ingest(tmp_path: Path, ingested: tuple[Path, Path]) -> None:
    tar, _ = ingested
    ingest_tar(tar, tmp_path, Settings())
    path = tmp_path / "0101.parquet"
    data = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(0).column(4)  # target_lat
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DigestMismatch, match=r"0101\.parquet: its bytes changed after stage 'ingest'"):
        fingerprint_tar(tar, path, tmp_path / "out", configured())
    (tmp_path / "_manifests/0101.parquet.json").unlink()
    with pytest.raises(ArtifactError, match=r"0101\.parquet: damaged page"):
        fingerprint_tar(tar, path, tmp_path / "out", configured())
    assert visible(tmp_path / "out") == []


@pytest.mark.real_data
@pytest.mark.parametrize("number", ["0201", "0202"])
def test_real_photographs(real_data: Path, tmp_path: Path, number: str) -> None:
    tar = real_data / f"buildings/{number}.tar"
    ingest_tar(tar, tmp_path, Settings())
    intermediates = tmp_path / f"{number}.parquet"
    found = {
        mode: matrix_of(fingerprint_tar(tar, intermediates, tmp_path / mode, configured(mode=mode)).artifact)
        for mode in ("exact", "scaled")
    }
    rows = pq.read_table(intermediates).to_pylist()
    whole = tar.read_bytes()
    reference = by_pillow([whole[row["image_offset"] :][: row["image_bytes"]] for row in rows])
    assert differences(found["exact"], reference).max() <= 1
    scaled = differences(found["scaled"], reference)
    assert scaled.max() <= 3
    assert scaled.mean() < 0.15
    assert neighbour_agreement(found["exact"], reference, 10) >= 0.99
    assert neighbour_agreement(found["scaled"], reference, 10) >= 0.98
