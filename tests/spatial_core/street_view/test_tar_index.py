"""The strict walk against the standard library on sound archives, and against every kind of damage."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatial_core.errors import InputError, TarError
from spatial_core.street_view.tar_index import TarMember, read_members
from tests.data.make_tars import BLOCK, DAMAGES, Entry, members, street_view, tar_bytes

SOUND = tar_bytes(street_view(101, seed=1))
FILE_SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(tmp_path: Path, data: bytes) -> list[TarMember]:
    path = tmp_path / "0101.tar"
    path.write_bytes(data)
    return list(read_members(path))


def header(name: bytes = b"x.jpg", size: bytes = b"00000000000\0", flag: bytes = b"0", **fields: bytes) -> bytes:
    """A header block with a right checksum; `fields` are `at_OFFSET=bytes`."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = flag
    block[257:265] = b"ustar\x0000"
    for place, value in fields.items():
        at = int(place.removeprefix("at_"))
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)

names = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_characters="/"), min_size=1, max_size=60)
paths = st.lists(names, min_size=1, max_size=6).map("/".join).filter(lambda path: set(path) - {".", "/"})


@FILE_SETTINGS
@given(
    content=st.lists(st.tuples(paths, st.integers(0, 1500)), max_size=8),
    format_name=st.sampled_from(["gnu", "pax"]),
    folders=st.booleans(),
)
def test_sound_archives_read_as_the_standard_library_reads_them(
    tmp_path: Path, content: list[tuple[str, int]], format_name: str, folders: bool
) -> None:
    data = tar_bytes([Entry(name, b"\xa5" * size) for name, size in content], format_name, folders=folders)
    expected = [(m.name, m.isdir(), m.offset, m.offset_data, m.size) for m in members(data)]
    found = [(m.name.rstrip("/"), m.kind == "directory", m.offset, m.data_offset, m.size) for m in read(tmp_path, data)]
    assert found == expected


def test_ustar_prefix_of_long_paths(tmp_path: Path) -> None:
    name = "/".join(["d" * 30] * 6) + "/x.jpg"
    assert [m.name for m in read(tmp_path, tar_bytes([Entry(name, b"1")], "ustar"))] == [name]


def test_names_that_are_not_utf8_survive_as_surrogates(tmp_path: Path) -> None:
    (member,) = read(tmp_path, header(b"caf\xe9.txt") + END)
    assert member.name.encode("utf-8", "surrogateescape") == b"caf\xe9.txt"


@pytest.mark.parametrize(
    ("flag", "kind"),
    [
        (b"\0", "file"),
        (b"7", "file"),
        (b"1", "hard_link"),
        (b"2", "symlink"),
        (b"3", "character_device"),
        (b"4", "block_device"),
        (b"5", "directory"),
        (b"6", "fifo"),
        (b"V", "unsupported"),
        (b"\xff", "unsupported"),
    ],
)
def test_kinds(tmp_path: Path, flag: bytes, kind: str) -> None:
    found = read(tmp_path, header(b"a", flag=flag) + header(b"b.txt") + END)
    assert [(m.name, m.kind) for m in found] == [("a", kind), ("b.txt", "file")]


def test_folders_of_archives_older_than_ustar(tmp_path: Path) -> None:
    old = header(b"0101/", flag=b"\0", at_257=bytes(8))
    assert [m.kind for m in read(tmp_path, old + END)] == ["directory"]


def test_links_have_no_data_whatever_their_size_says(tmp_path: Path) -> None:
    data = header(b"s", size=b"00000000144\0", flag=b"2") + header(b"b.txt") + END
    assert [(m.name, m.size) for m in read(tmp_path, data)] == [("s", 0), ("b.txt", 0)]


def test_base_256_size_beyond_octal(tmp_path: Path) -> None:
    size = 9 << 30
    path = tmp_path / "0101.tar"
    with path.open("wb") as handle:  # sparse on disk
        handle.write(header(size=b"\x80" + size.to_bytes(11, "big")))
        handle.seek(size, os.SEEK_CUR)
        handle.write(header(b"last.txt") + END)
    assert [(m.name, m.data_offset, m.size) for m in read_members(path)] == [
        ("x.jpg", BLOCK, size),
        ("last.txt", size + 2 * BLOCK, 0),
    ]


def test_pax_records_override_the_header_and_global_ones_last(tmp_path: Path) -> None:
    pax_size = padded(b"12 size=700\n" + b"22 path=long/name.jpg\n" + b"11 mtime=1\n")
    global_record = padded(b"13 comment=x\n")
    data = (
        header(flag=b"g", size=b"00000000015\0")
        + global_record
        + header(flag=b"x", size=b"%011o\0" % (12 + 22 + 11))
        + pax_size
        + header(b"short.jpg", size=b"00000000001\0")
        + padded(b"p" * 700)
        + header(b"after.txt")
        + END
    )
    found = read(tmp_path, data)
    assert [(m.name, m.size, m.offset) for m in found] == [
        ("long/name.jpg", 700, 2 * BLOCK),
        ("after.txt", 0, 7 * BLOCK),
    ]
    with tarfile.open(fileobj=io.BytesIO(data)) as reference:
        assert [(m.name, m.size, m.offset) for m in reference] == [(m.name, m.size, m.offset) for m in found]


def test_sparse_members_of_both_kinds_are_told_apart_and_stepped_over(tmp_path: Path) -> None:
    old = header(b"old.jpg", size=b"00000001000\0", flag=b"S", at_257=b"ustar  \0", at_482=b"\1")
    more_map = bytes(504) + b"\1" + bytes(7) + bytes(BLOCK)
    records = b"22 GNU.sparse.major=1\n" + b"28 GNU.sparse.name=real.jpg\n"
    pax = header(flag=b"x", size=b"%011o\0" % len(records)) + padded(records)
    data = old + more_map + padded(b"o" * 512) + pax + header(b"GNUSparseFile.0/x", size=b"00000001000\0") + b"n" * 512
    found = read(tmp_path, data + header(b"after.txt") + END)
    assert [(m.name, m.kind, m.data_offset) for m in found] == [
        ("old.jpg", "sparse", 3 * BLOCK),
        ("real.jpg", "sparse", 7 * BLOCK),
        ("after.txt", "file", 9 * BLOCK),
    ]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("format_name", ["ustar", "gnu", "pax"])
def test_damage_is_refused_with_tar_offset_and_cause(tmp_path: Path, damage: str, format_name: str) -> None:
    data = DAMAGES[damage](tar_bytes(street_view(101, seed=1), format_name))
    with pytest.raises(TarError, match=r"/0101\.tar: byte \d+: \w+"):
        read(tmp_path, data)


def test_the_standard_library_swallows_what_is_refused_here() -> None:
    """Why this reader exists: these damaged archives look like shorter, sound ones to `tarfile`."""
    whole = len(members(SOUND))
    for damage in ("cut_at_member_boundary", "cut_inside_header", "flipped_bit_in_name", "zero_block_inserted"):
        assert len(members(DAMAGES[damage](SOUND))) < whole


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (header(size=b"0000000zzz0\0") + END, "size field"),
        (header(size=b"\xff" * 12) + END, "size field"),
        (header(at_257=b"tsar  ") + END, "unknown header format"),
        (header(b"x.jpg", flag=b"L") + END, "without its member"),
        (header(flag=b"x", size=b"00000000003\0") + padded(b"abc") + header() + END, "malformed pax record"),
        (header(flag=b"x", size=b"00000000014\0") + padded(b"99 size=100\n") + header() + END, "malformed pax record"),
        (header(flag=b"x", size=b"00000000012\0") + padded(b"10 size=x\n") + header() + END, "pax size"),
        (header(flag=b"x", size=b"77777777777\0") + END, "extended header of"),
        (header(flag=b"L", size=b"00000010000\0") + padded(b"long"), "cut inside"),
        (2 * (header(flag=b"L", size=b"00000000004\0") + padded(b"name")) + header() + END, "two extended headers"),
    ],
)
def test_malformed_headers(tmp_path: Path, data: bytes, cause: str) -> None:
    with pytest.raises(TarError, match=cause):
        read(tmp_path, data)


@FILE_SETTINGS
@given(data=st.data())
def test_a_flipped_header_bit_raises_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    expected = read(tmp_path, SOUND)
    at = data.draw(st.sampled_from(expected)).offset * 8 + data.draw(st.integers(0, BLOCK * 8 - 1))
    damaged = bytearray(SOUND)
    damaged[at // 8] ^= 1 << at % 8
    try:
        assert read(tmp_path, bytes(damaged)) == expected
    except TarError as error:
        assert "byte" in str(error)


@FILE_SETTINGS
@given(length=st.integers(0, len(SOUND)))
def test_a_cut_raises_unless_only_padding_behind_the_end_marker_is_lost(tmp_path: Path, length: int) -> None:
    last = members(SOUND)[-1]
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK + 2 * BLOCK
    if length >= end:
        assert len(read(tmp_path, SOUND[:length])) == len(members(SOUND))
    else:
        with pytest.raises(TarError):
            read(tmp_path, SOUND[:length])


@FILE_SETTINGS
@given(noise=st.binary(min_size=1, max_size=3000))
def test_noise_is_refused(tmp_path: Path, noise: bytes) -> None:
    with pytest.raises(TarError):
        read(tmp_path, noise)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "0101.tar"
    path.write_bytes(SOUND)
    walk = read_members(path)
    next(walk)
    os.truncate(path, 2 * BLOCK)
    with pytest.raises(TarError, match="shrank from"):
        list(walk)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        list(read_members(tmp_path / "0101.tar"))
    with pytest.raises(InputError, match="not a regular file"):
        list(read_members(tmp_path))
