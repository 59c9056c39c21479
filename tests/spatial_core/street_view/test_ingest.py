"""Ingest against a plain reading of the specification, and against everything that can be wrong with a tar."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spatial_core import schemas
from spatial_core.config.settings import Settings
from spatial_core.errors import InputError, TarError
from spatial_core.images.byte_ranges import TarImages
from spatial_core.report import Report
from spatial_core.schemas import FOLDER_REASON
from spatial_core.storage.parquet import read_provenance
from spatial_core.storage.provenance import read_manifest, verify_artifact
from spatial_core.street_view import ingest
from spatial_core.street_view.ingest import ingest_tar
from spatial_core.street_view.waiting_halves import WaitingHalves
from tests.data.make_tars import (
    BLOCK,
    DAMAGES,
    FAULTS,
    Entry,
    a_line,
    d_line,
    members,
    picture,
    pillow_image,
    street_view,
    tar_bytes,
)

ENTRIES = street_view(101, seed=2)
SPEC_COLUMNS = [
    "dataset_id",
    "target_id",
    "patch_id",
    "street_view_id",
    "target_lat",
    "target_lon",
    "building_id",
    "streetview_image_id",
    "image_path",
    "tar_file",
]


def configured(threads: int = 2, row_group_size: int = 50_000) -> Settings:
    return Settings(infrastructure={"threads": threads}, process_tar={"row_group_size": row_group_size})


def write(folder: Path, data: bytes, name: str = "0101.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


def run(tmp_path: Path, data: bytes, **settings_: int) -> Report:
    return ingest_tar(write(tmp_path / "raw", data), tmp_path / "out", configured(**settings_))


def rows_of(folder: Path, name: str = "0101") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return rows


def rejects_of(folder: Path, name: str = "0101") -> list[dict[str, Any]]:
    rejects: list[dict[str, Any]] = pq.read_table(folder / f"{name}_rejects.parquet").to_pylist()
    return rejects


def visible(folder: Path) -> set[str]:
    """Files a reader of the folder could take for artifacts."""
    return {path.name for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")}


def reference_rows(tar: Path) -> list[dict[str, Any]]:
    """The specification read word for word: a row for each text with 18 tokens and a readable image beside it."""
    rows = []
    with tarfile.open(tar) as archive:
        images = {
            Path(m.name).with_suffix("").as_posix(): m for m in archive if m.name.lower().endswith(("jpg", "jpeg"))
        }
        for member in archive:
            if not member.name.lower().endswith(".txt"):
                continue
            image = images[Path(member.name).with_suffix("").as_posix()]
            data = archive.extractfile(image).read()  # type: ignore[union-attr]
            pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
            text = archive.extractfile(member).read().decode()  # type: ignore[union-attr]
            lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
            values, alignment = lines["d"], lines.get("a")
            number = tar.stem
            rows.append(
                {
                    "dataset_id": int(number),
                    **dict(zip(SPEC_COLUMNS[1:4], map(int, values[1:4]), strict=True)),
                    "target_lat": float(values[4]),
                    "target_lon": float(values[5]),
                    "building_id": f"{number}_{int(values[1])}",
                    "streetview_image_id": f"{number}_{int(values[2])}",
                    "image_path": image.name,
                    "tar_file": tar.name,
                    **dict(zip([f.name for f in schemas.GEOMETRY[:11]], map(float, values[6:]), strict=True)),
                    **{
                        f.name: float(alignment[28 + i]) if alignment else None
                        for i, f in enumerate(schemas.GEOMETRY[11:])
                    },
                    "image_offset": image.offset_data,
                    "image_bytes": len(data),
                    "image_width": pixels.shape[1],
                    "image_height": pixels.shape[0],
                    "image_sha256": hashlib.sha256(data).hexdigest(),
                }
            )
    return rows


@pytest.mark.parametrize("layout", ["nested", "flat"])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("format_name", ["ustar", "gnu", "pax"])
def test_sound_tars_give_the_rows_of_the_specification(
    tmp_path: Path, layout: Any, aligned: bool, format_name: str
) -> None:
    entries = street_view(101, seed=4, layout=layout, aligned=aligned)
    data = tar_bytes(entries, format_name, folders=True)
    report = run(tmp_path, data)
    table = pq.read_table(tmp_path / "out/0101.parquet")
    assert table.schema.equals(schemas.INTERMEDIATES, check_metadata=True)
    assert table.column_names[: len(SPEC_COLUMNS)] == SPEC_COLUMNS
    assert table.to_pylist() == reference_rows(tmp_path / "raw/0101.tar")
    folders = ["0101", "0101/0101"] if layout == "nested" else []
    rejects = rejects_of(tmp_path / "out")
    assert [(reject["member_path"].rstrip("/"), reject["reason"]) for reject in rejects] == [
        (folder, FOLDER_REASON) for folder in folders
    ]
    assert pq.read_schema(tmp_path / "out/0101_rejects.parquet").equals(schemas.REJECTS, check_metadata=True)
    assert (report.rows, report.rows_in, report.kept, dict(report.rejected)) == (
        len(table),
        len(entries) + len(folders),
        len(entries),
        {FOLDER_REASON: len(folders)} if folders else {},
    )
    assert report.details["images"] == len(table)
    assert report.details["buildings"] == len(set(table["target_id"].to_pylist())) == 4
    assert report.details["alignment"] == {"present" if aligned else "absent": len(table)}
    assert report.details["tar"]["sha256"] == hashlib.sha256(data).hexdigest()


def test_recorded_offsets_and_digests_read_the_images_back(tmp_path: Path) -> None:
    run(tmp_path, tar_bytes(ENTRIES, "pax"))
    by_name = {entry.name: entry.data for entry in ENTRIES}
    with TarImages(tmp_path / "raw/0101.tar") as images:
        for row in rows_of(tmp_path / "out"):
            data = images.verified(row["image_offset"], row["image_bytes"], row["image_sha256"])
            assert data == by_name[row["image_path"]]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_member_is_kept_or_rejected_with_its_reason(tmp_path: Path, fault: str) -> None:
    entries = FAULTS[fault].change(ENTRIES)
    data = tar_bytes(entries)
    report = run(tmp_path, data)
    assert dict(report.rejected) == FAULTS[fault].reasons
    rejects = rejects_of(tmp_path / "out")
    assert Counter(reject["reason"] for reject in rejects) == FAULTS[fault].reasons
    assert report.rows_in == len(entries) == report.kept + len(rejects)

    at = {m.offset: m for m in members(data)}
    for reject in rejects:
        member = at.pop(reject["member_offset"])
        expected = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        assert (reject["member_path"].rstrip("/"), reject["tar_file"]) == (expected, "0101.tar")
        assert reject["member_bytes"] == member.size
        assert reject["detail"]
    kept = {m.name for m in at.values()}
    assert {row["image_path"] for row in rows_of(tmp_path / "out")} == {
        name for name in kept if not name.endswith("txt")
    }
    assert visible(tmp_path) == {"0101.tar", "0101.parquet", "0101_rejects.parquet", "0101.parquet.json"}


def test_the_counters_of_the_earlier_pipeline_follow_from_the_two_files(tmp_path: Path) -> None:
    """It counted texts: those with an unreadable image, without one, and those it could not parse itself."""
    entries: list[Entry] = []
    for number, fault in enumerate(("orphan_text", "truncated_image", "empty_text", "16_numbers", "orphan_image")):
        entries += FAULTS[fault].change(street_view(101, seed=20 + number, targets=2))
    data = tar_bytes(entries, folders=True)
    run(tmp_path, data)
    with tarfile.open(tmp_path / "raw/0101.tar") as archive:
        archive.extractall(tmp_path / "extracted", filter="data")
    expected: Counter[str] = Counter()
    for text in (tmp_path / "extracted").rglob("*.txt"):
        image = text.with_suffix(".jpg")
        expected["total_metadata_files"] += 1
        if not text.read_text().startswith("d ") or len(text.read_text().split("\n")[0].split()) != 18:
            expected["orphan_metadata"] += 1
        elif not image.exists():
            expected["missing_images"] += 1
        else:
            try:
                Image.open(image).load()
                expected["valid_entries"] += 1
            except OSError:
                expected["corrupted_images"] += 1

    kept = pq.read_table(tmp_path / "out/0101.parquet")
    rejects = pq.read_table(tmp_path / "out/0101_rejects.parquet")
    assert len(kept) and len(rejects)
    found = duckdb.sql(
        "with texts as (select reason from rejects where member_path ilike '%.txt'), "
        "valid as (select count(*) as valid_entries from kept) select any_value(valid_entries) as valid_entries, "
        "count(*) filter (reason = 'orphan_text') as missing_images, "
        "count(*) filter (reason = 'partner_rejected') as corrupted_images, "
        "count(*) filter (reason not in ('orphan_text', 'partner_rejected')) as orphan_metadata, "
        "count(*) + any_value(valid.valid_entries) as total_metadata_files from texts cross join valid"
    )
    assert dict(zip(found.columns, found.fetchall()[0], strict=True)) == expected
    assert min(expected.values()) > 0


def test_faulty_pairs_never_touch_sound_ones(tmp_path: Path) -> None:
    """All faults in one tar: rows of the untouched pairs are what they are without the faults."""
    entries = street_view(101, seed=5)
    for number, fault in enumerate(FAULTS.values()):
        rng = np.random.default_rng(number)
        stem = f"0101/0101/extra{number}"
        ids = (10_000 + number, 20_000 + number, 5)
        pair = [Entry(f"{stem}.jpg", picture(rng)), Entry(f"{stem}.txt", d_line(rng, 101, *ids).encode())]
        if sum(fault.reasons.values()) == 2 and "partner_rejected" in fault.reasons:
            entries[4:4] = fault.change(pair)
    run(tmp_path / "clean", tar_bytes(street_view(101, seed=5)))
    report = run(tmp_path / "dirty", tar_bytes(entries))
    assert report.rejected["partner_rejected"] > 20
    clean, dirty = rows_of(tmp_path / "clean/out"), rows_of(tmp_path / "dirty/out")
    for row in clean + dirty:
        row.pop("image_offset")
    assert dirty == clean


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tar_gives_an_error_and_no_file(tmp_path: Path, damage: str) -> None:
    with pytest.raises(TarError, match=r"0101\.tar: byte \d+: "):
        run(tmp_path, DAMAGES[damage](tar_bytes(ENTRIES)))
    assert visible(tmp_path / "out") == set()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_header_bit_raises_or_leaves_the_rows_alone(tmp_path: Path, data: st.DataObject) -> None:
    sound = tar_bytes(ENTRIES[:4])
    run(tmp_path / "sound", sound)
    offset = data.draw(st.sampled_from([m.offset for m in members(sound)]))
    bit = offset * 8 + data.draw(st.integers(0, BLOCK * 8 - 1))
    damaged = bytearray(sound)
    damaged[bit // 8] ^= 1 << bit % 8
    try:
        run(tmp_path / "damaged", bytes(damaged))
    except TarError:
        return
    assert rows_of(tmp_path / "damaged/out") == rows_of(tmp_path / "sound/out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(ENTRIES), overflow=st.booleans())
def test_any_order_of_members_gives_the_same_pairs(tmp_path: Path, order: list[Entry], overflow: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if overflow:
            patch.setattr(ingest, "WaitingHalves", partial(WaitingHalves, limit=1))
        report = run(tmp_path, tar_bytes(order))
    assert report.kept == len(ENTRIES)

    def without_place(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(
            ({key: value for key, value in row.items() if key != "image_offset"} for row in rows),
            key=lambda row: row["patch_id"],
        )

    assert without_place(rows_of(tmp_path / "out")) == without_place(reference_rows(tmp_path / "raw/0101.tar"))
    stems = [entry.name[:-4] for entry in order]
    completed = [stem for place, stem in enumerate(stems) if stem in stems[:place]]
    assert [row["image_path"][:-4] for row in rows_of(tmp_path / "out")] == completed


def test_orphans_found_at_the_end_are_in_tar_order_with_and_without_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tar_bytes(ENTRIES[:2] + ENTRIES[2::3])
    run(tmp_path / "memory", data)
    monkeypatch.setattr(ingest, "WaitingHalves", partial(WaitingHalves, limit=1))
    run(tmp_path / "file", data)
    rejects = rejects_of(tmp_path / "memory/out")
    assert [reject["member_offset"] for reject in rejects] == sorted(reject["member_offset"] for reject in rejects)
    assert {reject["reason"] for reject in rejects} == {"orphan_image", "orphan_text"}
    assert rejects_of(tmp_path / "file/out") == rejects


def test_threads_and_places_never_change_a_byte(tmp_path: Path) -> None:
    entries = [*street_view(101, seed=6, targets=60, side_px=16), *FAULTS["both_bad"].change(ENTRIES)]
    data = tar_bytes(entries)
    written = set()
    for threads in (1, 2, 7):
        run(tmp_path / str(threads), data, threads=threads)
        out = tmp_path / str(threads) / "out"
        written.add((out.joinpath("0101.parquet").read_bytes(), out.joinpath("0101_rejects.parquet").read_bytes()))
    assert len(written) == 1


def test_row_groups_have_the_size_that_is_set(tmp_path: Path) -> None:
    data = tar_bytes(ENTRIES)
    run(tmp_path / "one", data)
    report = run(tmp_path / "many", data, row_group_size=3)
    metadata = pq.ParquetFile(tmp_path / "many/out/0101.parquet").metadata
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert sizes[:-1] == [3] * (report.rows // 3)
    assert sum(sizes) == report.rows
    assert rows_of(tmp_path / "many/out") == rows_of(tmp_path / "one/out")


def test_one_policy_for_unusual_but_sound_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": ignored, width and height are the stored ones
    images = {
        "grey.jpg": picture(rng, 40, "GRAY"),
        "turned.JPG": pillow_image("RGB", (48, 24), "JPEG", exif=exif),
        "progressive.jpeg": pillow_image("RGB", (30, 50), "JPEG", progressive=True),
        "deep/deeper/x.Jpeg": pillow_image("RGB", (8, 8), "JPEG"),
        "./here.jpg": pillow_image("RGB", (9, 10), "JPEG"),
    }
    entries = []
    for number, (name, data) in enumerate(images.items()):
        text = d_line(rng, 101, number, number, number).encode()
        entries += [Entry(name, data), Entry(name.rpartition(".")[0] + (".TXT" if number % 2 else ".txt"), text)]
    run(tmp_path, tar_bytes(entries))
    found = {row["image_path"]: (row["image_width"], row["image_height"]) for row in rows_of(tmp_path / "out")}
    assert found == {
        "grey.jpg": (40, 40),
        "turned.JPG": (48, 24),
        "progressive.jpeg": (30, 50),
        "deep/deeper/x.Jpeg": (8, 8),
        "./here.jpg": (9, 10),
    }


def test_a_damaged_alignment_line_is_counted_and_the_image_kept(tmp_path: Path) -> None:
    entries = street_view(101, seed=8, aligned=True)
    text = entries[3].data.decode().splitlines()[0] + "\n" + a_line(np.random.default_rng(0))[:50] + "\n"
    entries[3] = replace(entries[3], data=text.encode())
    report = run(tmp_path, tar_bytes(entries))
    assert report.details["alignment"] == {"malformed": 1, "present": report.rows - 1}
    first, second = rows_of(tmp_path / "out")[:2]
    names = [field.name for field in schemas.GEOMETRY[11:]]
    assert None not in [first[name] for name in names]
    assert [second[name] for name in names] == [None] * 4


def test_names_with_other_numbers_say_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    text = d_line(rng, 101, 1, 2, 3).encode()
    for name in ("0101_3_1_2", "0999_9_9_9", "0101_9_9", "picture"):
        report = run(tmp_path, tar_bytes([Entry(f"{name}.jpg", picture(rng)), Entry(f"{name}.txt", text)]))
        assert report.rows == 1
    with pytest.raises(InputError, match="name_contradicts_text 2"):
        run(tmp_path, tar_bytes([Entry("0101_2_3_9.jpg", picture(rng)), Entry("0101_2_3_9.txt", text)]))


@pytest.mark.parametrize(("entries", "counts"), [(ENTRIES[:1], "orphan_image 1"), ([], "the tar is empty")])
def test_a_tar_without_a_valid_pair(tmp_path: Path, entries: list[Entry], counts: str) -> None:
    with pytest.raises(InputError, match=f"no valid pair of image and text .*{counts}"):
        run(tmp_path, tar_bytes(entries))
    assert visible(tmp_path / "out") == {"0101_rejects.parquet"}
    assert len(rejects_of(tmp_path / "out")) == len(entries)


def test_a_tar_that_is_refused_leaves_what_was_made_of_the_one_before(tmp_path: Path) -> None:
    report = run(tmp_path, tar_bytes([*ENTRIES, Entry("notes.md", b"x")]))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    with pytest.raises(InputError, match=r"orphan_image 1\); each is listed in .*/0101_refused.parquet"):
        run(tmp_path, tar_bytes(ENTRIES[:1]))
    assert {path: path.read_bytes() for path in files} == before
    assert pq.read_table(tmp_path / "out" / "0101_refused.parquet").num_rows == 1
    again = run(tmp_path, tar_bytes([*ENTRIES, Entry("notes.md", b"x")]))
    assert (again.rows, again.rejected) == (report.rows, report.rejected)
    run(tmp_path, tar_bytes(ENTRIES))
    assert "0101_refused.parquet" not in visible(tmp_path / "out"), "the next success takes it away"


@pytest.mark.parametrize("name", ["101.tar", "0101.tar.gz", "x0101.tar", "0101.TAR", "0101.tar\n"])
def test_ill_named_tars(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="the file name must match"):
        ingest_tar(write(tmp_path, tar_bytes(ENTRIES), name), tmp_path / "out", configured())


def test_other_name_patterns_must_still_give_a_number(tmp_path: Path) -> None:
    settings_ = Settings(process_tar={"tar_name_pattern": r".+\.tar"})
    with pytest.raises(InputError, match="must be the data set number"):
        ingest_tar(write(tmp_path, tar_bytes(ENTRIES), "city.tar"), tmp_path / "out", settings_)
    data = tar_bytes(street_view(12345, seed=1))
    ingest_tar(write(tmp_path, data, "12345.tar"), tmp_path / "out", settings_)
    assert rows_of(tmp_path / "out", "12345")[0]["building_id"].startswith("12345_")


def test_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        ingest_tar(tmp_path / "0101.tar", tmp_path / "out", configured())


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    first = run(tmp_path, tar_bytes(ENTRIES))
    artifact = tmp_path / "out/0101.parquet"
    stat = artifact.stat()
    again = ingest_tar(tmp_path / "raw/0101.tar", tmp_path / "out", configured(threads=1))
    assert again == first.unchanged()
    assert artifact.stat() == stat


def test_a_tar_written_again_with_the_same_bytes_is_only_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Touched, or copied anew: one pass of hashing, no decoding, the files untouched, and the next run free."""
    first = run(tmp_path, tar_bytes(ENTRIES))
    artifact, tar = tmp_path / "out/0101.parquet", tmp_path / "raw/0101.tar"
    stat = artifact.stat()
    os.utime(tar, (1, 1))
    read: list[int] = []
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        data = pread(fd, length, offset)
        read.append(len(data))
        return data

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counted)
        again = ingest_tar(tar, tmp_path / "out", configured())
    assert sum(read) == tar.stat().st_size
    assert again.up_to_date
    assert again.details == {**first.details, "tar": {**first.details["tar"], "mtime_ns": 10**9}}
    assert artifact.stat() == stat
    recorded = read_manifest(artifact)
    assert recorded is not None
    assert (recorded["report"]["seconds"], recorded["report"]["up_to_date"]) == (round(first.seconds, 3), False)
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "FollowingDigest", None)  # not even hashed any more
        assert ingest_tar(tar, tmp_path / "out", configured()) == again


def test_a_tar_replaced_by_one_of_the_same_size_is_read_again(tmp_path: Path) -> None:
    first = run(tmp_path, tar_bytes(ENTRIES))
    entries = _with_other_distance(ENTRIES)
    report = run(tmp_path, tar_bytes(entries))
    assert report.details["tar"]["bytes"] == first.details["tar"]["bytes"]
    assert not report.up_to_date
    assert rows_of(tmp_path / "out") == reference_rows(tmp_path / "raw/0101.tar")


def _with_other_distance(entries: list[Entry]) -> list[Entry]:
    """The same entries with one digit of the first text changed."""
    text = entries[1].data
    at = text.rindex(b" 0\n") - 1
    digit = b"1" if text[at : at + 1] != b"1" else b"2"
    return [entries[0], replace(entries[1], data=text[:at] + digit + text[at + 1 :]), *entries[2:]]


def test_a_tar_written_again_counts_only_while_both_files_stand(tmp_path: Path) -> None:
    data = tar_bytes([*ENTRIES, ENTRIES[0]])
    run(tmp_path, data)
    os.utime(tmp_path / "raw/0101.tar", (1, 1))
    (tmp_path / "out/0101_rejects.parquet").unlink()
    assert not run(tmp_path, data).up_to_date
    assert len(rejects_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("name", ["0101.parquet", "0101_rejects.parquet"])
@pytest.mark.parametrize("change", ["missing", "flipped"])
def test_a_damaged_output_is_made_again(tmp_path: Path, name: str, change: str) -> None:
    run(tmp_path, tar_bytes(ENTRIES))
    path = tmp_path / "out" / name
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
    report = ingest_tar(tmp_path / "raw/0101.tar", tmp_path / "out", configured())
    assert not report.up_to_date
    assert path.read_bytes() == data


def test_a_replaced_tar_is_read_again(tmp_path: Path) -> None:
    run(tmp_path, tar_bytes(ENTRIES))
    report = run(tmp_path, tar_bytes(street_view(101, seed=99)))
    assert not report.up_to_date
    assert rows_of(tmp_path / "out") == reference_rows(tmp_path / "raw/0101.tar")


def test_provenance_holds_content_only(tmp_path: Path) -> None:
    data = tar_bytes(ENTRIES)
    report = run(tmp_path, data)
    for name in ("0101.parquet", "0101_rejects.parquet"):
        provenance = read_provenance(tmp_path / "out" / name)
        assert provenance is not None
        assert provenance.inputs == {"tar": hashlib.sha256(data).hexdigest()}
        assert (provenance.stage, provenance.config_digest) == ("ingest", configured().digest)
    verify_artifact(report.artifact)


def _touch(tar: Path) -> None:
    os.utime(tar, (5, 5))


def _append(tar: Path) -> None:
    with tar.open("ab") as handle:
        handle.write(bytes(BLOCK))


def _cut(tar: Path) -> None:
    os.truncate(tar, tar.stat().st_size // 2)


def _swap(tar: Path) -> None:
    data = tar.read_bytes()
    tar.unlink()
    tar.with_suffix(".new").write_bytes(data)
    tar.with_suffix(".new").rename(tar)


@pytest.mark.parametrize("change", [_touch, _append, _cut, _swap, Path.unlink])
def test_a_tar_that_changes_while_it_is_read(tmp_path: Path, change: Any) -> None:
    data = tar_bytes(street_view(101, seed=3, targets=120, side_px=16))
    tar = write(tmp_path / "raw", data)
    changed = False

    def meddle(done: int, total: int | None, message: str) -> None:
        nonlocal changed
        if not changed:
            changed = True
            change(tar)

    with pytest.raises(TarError, match=r"0101\.tar: byte \d+"):
        ingest_tar(tar, tmp_path / "out", configured(threads=1), meddle)
    assert changed
    assert visible(tmp_path / "out") == set()


def test_progress_counts_up_to_the_whole_tar(tmp_path: Path) -> None:
    tar = write(tmp_path / "raw", tar_bytes(street_view(101, seed=3, targets=120, side_px=16)))
    seen: list[tuple[int, int | None]] = []
    ingest_tar(tar, tmp_path / "out", configured(threads=1), lambda done, total, message: seen.append((done, total)))
    assert len(seen) > 2
    assert seen == sorted(seen)
    assert seen[-1] == (tar.stat().st_size, tar.stat().st_size)
