"""Bytes of a tar by offset: bounds, digests, threads, and a tar that changes underneath."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spatial_core.errors import DigestMismatch, InputError, TarError
from spatial_core.images.byte_ranges import TarImages

DATA = bytes(range(256)) * 400


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "0101.tar"
    path.write_bytes(DATA)
    return path


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_views_are_the_bytes(tar: Path) -> None:
    with TarImages(tar) as images:
        first, whole, none = images.view(300, 700), images.view(0, len(DATA)), images.view(len(DATA), 0)
        assert images.verified(5, 50, sha(DATA[5:55])) == DATA[5:55]
    assert [bytes(view) for view in (first, whole, none)] == [DATA[300:1000], DATA, b""]
    assert (first.format, first.ndim, first.readonly) == ("B", 1, True)


def test_many_threads_share_one(tar: Path) -> None:
    places = [(at, 97) for at in range(0, len(DATA) - 97, 53)]
    with TarImages(tar) as images, ThreadPoolExecutor(8) as pool:
        for (at, length), view in zip(places, pool.map(lambda place: images.view(*place), places), strict=True):
            assert view == DATA[at : at + length]


@pytest.mark.parametrize(("offset", "length"), [(-1, 5), (0, len(DATA) + 1), (len(DATA), 1), (5, -1), (1 << 62, 1)])
def test_places_outside_the_tar(tar: Path, offset: int, length: int) -> None:
    with TarImages(tar) as images, pytest.raises(TarError, match=f"byte {offset}: .* rebuild its intermediates"):
        images.view(offset, length)


def test_changed_bytes_name_tar_offset_and_what_to_rebuild(tar: Path) -> None:
    digest = sha(DATA[1000:1100])
    with tar.open("r+b") as handle:
        handle.seek(1050)
        handle.write(b"\xff")
    with TarImages(tar) as images, pytest.raises(DigestMismatch) as caught:
        images.verified(1000, 100, digest)
    assert "0101.tar: byte 1000:" in str(caught.value)
    assert "rebuild the intermediates of 0101.tar" in str(caught.value)


def test_a_tar_that_is_cut_while_open_is_an_error_not_a_crash(tar: Path) -> None:
    with TarImages(tar) as images:
        os.truncate(tar, 1000)
        assert images.view(0, 1000) == DATA[:1000]
        with pytest.raises(TarError, match="byte 1000: the tar ends here"):
            images.view(900, 500)


def test_a_tar_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.tar: cannot be opened \(No such file"):
        TarImages(tmp_path / "none.tar")


def test_closing_twice_is_harmless(tar: Path) -> None:
    images = TarImages(tar)
    images.close()
    images.close()
