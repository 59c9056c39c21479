"""Small tars in the 3D Street View layout, sound and damaged, from a seed. Nothing it makes is committed.

    python -m tests.data.make_tars FOLDER [--seed 7]

writes one sound tar of each layout and one of every damage in `DAMAGES` and every fault in `FAULTS`.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image

BLOCK = 512
Layout = Literal["nested", "flat"]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@dataclass(frozen=True)
class Entry:
    """A member to be: its name, data, and for special members their tar type and link target."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def picture(rng: np.random.Generator, side_px: int = 64, colorspace: str = "RGB") -> bytes:
    """A JPEG of a facade-like grid in random colours."""
    y, x = np.mgrid[0:side_px, 0:side_px]
    windows = ((x // rng.integers(4, 12)) % 2) & ((y // rng.integers(4, 12)) % 2)
    wall, glass = rng.integers(0, 256, (2, 3))
    pixels = np.where(windows[..., None], glass, wall) + rng.normal(0, 8, (side_px, side_px, 3))
    array = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if colorspace == "GRAY":
        array = np.ascontiguousarray(array[:, :, :1])
    encoded: bytes = simplejpeg.encode_jpeg(array, 85, colorspace)
    return encoded


def d_line(rng: np.random.Generator, dataset_id: int, target_id: int, patch_id: int, street_view_id: int) -> str:
    """A plausible `d` line."""
    lat, lon = 45 + target_id * 1e-4, 9 + target_id * 1e-4
    angle = rng.uniform(0, 2 * np.pi)
    numbers = [
        *(f"{value:.8f}" for value in (lat, lon)),
        f"{rng.uniform(2, 20):.2f}",
        *(f"{value:.6f}" for value in (np.cos(angle), np.sin(angle), 0.0)),
        *(f"{value:.8f}" for value in (lat + rng.normal(0, 1e-4), lon + rng.normal(0, 1e-4))),
        f"{rng.uniform(1, 3):.2f}",
        f"{rng.uniform(5, 80):.4f}",
        f"{rng.uniform(0, 360):.4f}",
        f"{rng.uniform(-10, 20):.4f}",
        "0",
    ]
    return f"d {dataset_id} {target_id} {patch_id} {street_view_id} {' '.join(numbers)}\n"


def a_line(rng: np.random.Generator) -> str:
    """A plausible `a` line: 40 numbers."""
    return "a " + " ".join(f"{value:.6f}" for value in rng.uniform(-3, 3, 40)) + "\n"


def street_view(
    dataset_id: int,
    seed: int,
    *,
    targets: int = 4,
    layout: Layout = "nested",
    aligned: bool = False,
    side_px: int = 64,
) -> list[Entry]:
    """Image and text entries of `targets` facade points with two to four views each."""
    rng = np.random.default_rng([seed, dataset_id])
    entries: list[Entry] = []
    patch_id = int(rng.integers(0, 5000))
    for target in range(targets):
        target_id = 100 + 7 * target
        for _ in range(int(rng.integers(2, 5))):
            patch_id += int(rng.integers(1, 4))
            street_view_id = 40_000 + int(rng.integers(0, 9000))
            name = f"{dataset_id:04d}_{patch_id:07d}_{street_view_id:07d}_{target_id:07d}"
            stem = f"{dataset_id:04d}/{dataset_id:04d}/{name}" if layout == "nested" else name
            text = d_line(rng, dataset_id, target_id, patch_id, street_view_id) + (a_line(rng) if aligned else "")
            entries += [Entry(f"{stem}.jpg", picture(rng, side_px)), Entry(f"{stem}.txt", text.encode())]
    return entries


def tar_bytes(entries: list[Entry], format_name: str = "gnu", *, folders: bool = False) -> bytes:
    """A well-formed tar of the entries, in order; with `folders`, a folder entry before the first member of each."""
    stream = io.BytesIO()
    seen: set[str] = set()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[format_name]) as tar:
        for entry in entries:
            parents = entry.name.split("/")[:-1] if folders else []
            for folder in ("/".join(parents[: depth + 1]) for depth in range(len(parents))):
                if folder not in seen:
                    seen.add(folder)
                    info = tarfile.TarInfo(folder)
                    info.type = tarfile.DIRTYPE
                    tar.addfile(info)
            info = tarfile.TarInfo(entry.name)
            info.type, info.linkname, info.size = entry.kind, entry.link, len(entry.data)
            tar.addfile(info, io.BytesIO(entry.data))
    return stream.getvalue()


def members(data: bytes) -> list[tarfile.TarInfo]:
    """Members of a well-formed tar, as the standard library sees them."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


# --- Damage to a tar as a whole: bytes of a well-formed tar -> bytes that must be refused. ---


def _middle(data: bytes) -> tarfile.TarInfo:
    found = members(data)
    return found[len(found) // 2]


def _end(data: bytes) -> int:
    last = members(data)[-1]
    return last.offset_data + -(-last.size // BLOCK) * BLOCK


def _with(data: bytes, at: int, piece: bytes) -> bytes:
    return data[:at] + piece + data[at + len(piece) :]


def _zip(data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("0101.tar", data)
    return stream.getvalue()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut_at_member_boundary": lambda data: data[: _middle(data).offset],
    "cut_inside_header": lambda data: data[: _middle(data).offset + 200],
    "cut_inside_data": lambda data: data[: _middle(data).offset_data + 20],
    "cut_inside_padding": lambda data: data[: _end(data) - 1],
    "no_end_marker": lambda data: data[: _end(data)],
    "one_zero_block_at_the_end": lambda data: data[: _end(data) + BLOCK],
    "flipped_bit_in_name": lambda data: _with(
        data, _middle(data).offset + 3, bytes([data[_middle(data).offset + 3] ^ 1])
    ),
    "flipped_bit_in_size": lambda data: _with(
        data, _middle(data).offset + 130, bytes([data[_middle(data).offset + 130] ^ 2])
    ),
    "flipped_bit_in_checksum": lambda data: _with(
        data, _middle(data).offset + 150, bytes([data[_middle(data).offset + 150] ^ 1])
    ),
    "zeroed_header": lambda data: _with(data, _middle(data).offset, bytes(BLOCK)),
    "zero_block_inserted": lambda data: data[: _middle(data).offset] + bytes(BLOCK) + data[_middle(data).offset :],
    "end_marker_in_the_middle": lambda data: (
        data[: _middle(data).offset] + bytes(2 * BLOCK) + data[_middle(data).offset :]
    ),
    "block_removed": lambda data: data[: _middle(data).offset_data] + data[_middle(data).offset_data + BLOCK :],
    "garbage_at_the_end": lambda data: data + b"\0" * 100 + b"x",
    "two_tars_in_one": lambda data: data + data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zip": _zip,
    "empty": lambda _: b"",
    "blanked_header": lambda data: data[:100] + bytes(BLOCK - 100) + data[BLOCK:],
    "text": lambda _: b"not a tar at all\n" * 100,
}


# --- Faults of single members: entries of a sound tar -> entries with the fault, and the reasons expected. ---


@dataclass(frozen=True)
class Fault:
    """`change` makes the fault; `reasons` are the rejections it must give, members by reason."""

    change: Callable[[list[Entry]], list[Entry]]
    reasons: dict[str, int]


def _numbers(entries: list[Entry]) -> list[str]:
    return entries[1].data.decode().split("\n")[0].split(" ")[1:]


def _text(change: Callable[[list[str]], list[str]]) -> Callable[[list[Entry]], list[Entry]]:
    """Rewrite the numbers of the first text's `d` line."""
    return lambda entries: _replace(entries, 1, ("d " + " ".join(change(_numbers(entries))) + "\n").encode())


def _set(index: int, value: str) -> Callable[[list[Entry]], list[Entry]]:
    return _text(lambda numbers: [*numbers[:index], value, *numbers[index + 1 :]])


def _replace(entries: list[Entry], index: int, data: bytes) -> list[Entry]:
    return [*entries[:index], replace(entries[index], data=data), *entries[index + 1 :]]


def _image(make: Callable[[bytes], bytes]) -> Callable[[list[Entry]], list[Entry]]:
    """Rewrite the first image."""
    return lambda entries: _replace(entries, 0, make(entries[0].data))


def _plus(*extra: Entry) -> Callable[[list[Entry]], list[Entry]]:
    return lambda entries: [*entries[:2], *extra, *entries[2:]]


def pillow_image(mode: str, size: tuple[int, int], format_name: str, **options: object) -> bytes:
    """An image that only Pillow writes (CMYK, PNG, progressive, EXIF)."""
    stream = io.BytesIO()
    Image.new(mode, size, 90 if mode == "L" else (90,) * len(mode)).save(stream, format_name, **options)
    return stream.getvalue()


def resized_header(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header."""
    frame = data.index(b"\xff\xc0")
    return _with(data, frame + 5, height.to_bytes(2, "big") + width.to_bytes(2, "big"))


_PAIR = {"partner_rejected": 1}
FAULTS: dict[str, Fault] = {
    "orphan_image": Fault(lambda entries: entries[:1] + entries[2:], {"orphan_image": 1}),
    "orphan_text": Fault(lambda entries: entries[1:], {"orphan_text": 1}),
    "unknown_suffix": Fault(
        _plus(Entry("0101/0101/readme.md", b"x"), Entry("0101/LICENSE", b"y"), Entry("0101/0101/.jpg", b"z")),
        {"unknown_suffix": 3},
    ),
    "parent_path": Fault(_plus(Entry("../../evil.jpg", b"x")), {"unsafe_name": 1}),
    "inner_parent_path": Fault(_plus(Entry("0101/../../evil.txt", b"x")), {"unsafe_name": 1}),
    "absolute_path": Fault(_plus(Entry("/etc/evil.txt", b"x")), {"unsafe_name": 1}),
    "backslash": Fault(_plus(Entry("0101\\0101\\x.txt", b"x")), {"unsafe_name": 1}),
    "newline": Fault(_plus(Entry("0101/a\nb.txt", b"x")), {"unsafe_name": 1}),
    "not_utf8": Fault(_plus(Entry("0101/caf\udce9.txt", b"x")), {"unsafe_name": 1}),
    "parent_folder": Fault(_plus(Entry("../evil", kind=tarfile.DIRTYPE)), {"unsafe_name": 1}),
    "folders": Fault(
        lambda entries: [Entry("0101", kind=tarfile.DIRTYPE), *entries, Entry("0101/x.jpg", kind=tarfile.DIRTYPE)],
        {"directory": 2},
    ),
    "symlink": Fault(_plus(Entry("0101/0101/s.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")), {"symlink": 1}),
    "hard_link": Fault(
        lambda entries: [*entries, Entry("0101/0101/h.jpg", kind=tarfile.LNKTYPE, link=entries[0].name)],
        {"hard_link": 1},
    ),
    "devices": Fault(
        _plus(
            Entry("0101/c.jpg", kind=tarfile.CHRTYPE),
            Entry("0101/b.txt", kind=tarfile.BLKTYPE),
            Entry("0101/p.txt", kind=tarfile.FIFOTYPE),
        ),
        {"character_device": 1, "block_device": 1, "fifo": 1},
    ),
    "vendor_type": Fault(_plus(Entry("0101/v.jpg", b"data" * 200, kind=b"V")), {"unsupported": 1}),
    "duplicate_image": Fault(lambda entries: [*entries, entries[0]], {"duplicate_member": 1}),
    "duplicate_text": Fault(lambda entries: [*entries[:2], entries[1], *entries[2:]], {"duplicate_member": 1}),
    "jpg_beside_jpeg": Fault(
        lambda entries: [replace(entries[0], name=entries[0].name.replace(".jpg", ".JPEG")), *entries],
        {"duplicate_member": 1},
    ),
    "duplicate_patch_id": Fault(
        lambda entries: [
            *entries,
            *(replace(entry, name=f"0101/again{entry.name[-4:]}") for entry in entries[:2]),
        ],
        {"duplicate_patch_id": 2},
    ),
    "texts_swapped": Fault(
        lambda entries: [
            entries[0],
            replace(entries[1], data=entries[3].data),
            entries[2],
            replace(entries[3], data=entries[1].data),
            *entries[4:],
        ],
        {"name_contradicts_text": 4},
    ),
    "empty_text": Fault(lambda entries: _replace(entries, 1, b""), {"text_empty": 1, **_PAIR}),
    "blank_text": Fault(lambda entries: _replace(entries, 1, b" \n\n"), {"text_empty": 1, **_PAIR}),
    "no_d_line": Fault(lambda entries: _replace(entries, 1, b"x 1 2 3\n"), {"no_d_line": 1, **_PAIR}),
    "two_d_lines": Fault(lambda entries: _replace(entries, 1, entries[1].data * 2), {"several_d_lines": 1, **_PAIR}),
    "undecodable_text": Fault(
        lambda entries: _replace(entries, 1, entries[1].data + b"\xff\xfe"), {"text_undecodable": 1, **_PAIR}
    ),
    "endless_text": Fault(lambda entries: _replace(entries, 1, b"d " * 10_000), {"text_too_long": 1, **_PAIR}),
    "16_numbers": Fault(_text(lambda numbers: numbers[:-1]), {"d_line_count": 1, **_PAIR}),
    "18_numbers": Fault(_text(lambda numbers: [*numbers, "0"]), {"d_line_count": 1, **_PAIR}),
    "a_word": Fault(_set(6, "high"), {"not_a_number": 1, **_PAIR}),
    "underscore": Fault(_set(6, "1_0"), {"not_a_number": 1, **_PAIR}),
    "nan": Fault(_set(7, "nan"), {"not_finite": 1, **_PAIR}),
    "infinity": Fault(_set(13, "-inf"), {"not_finite": 1, **_PAIR}),
    "overflow": Fault(_set(13, "1e999"), {"not_finite": 1, **_PAIR}),
    "latitude": Fault(_set(4, "90.001"), {"coordinate_out_of_range": 1, **_PAIR}),
    "longitude": Fault(_set(5, "-180.5"), {"coordinate_out_of_range": 1, **_PAIR}),
    "camera_latitude": Fault(_set(10, "-91"), {"coordinate_out_of_range": 1, **_PAIR}),
    "fractional_id": Fault(_set(1, "12.5"), {"id_not_integer": 1, **_PAIR}),
    "nan_id": Fault(_set(2, "nan"), {"not_finite": 1, **_PAIR}),
    "negative_id": Fault(_set(1, "-5"), {"id_negative": 1, **_PAIR}),
    "id_beyond_int64": Fault(_set(3, str(2**63)), {"id_too_large": 1, **_PAIR}),
    "id_of_a_thousand_digits": Fault(_set(3, "9" * 1000), {"id_too_large": 1, **_PAIR}),
    "other_data_set": Fault(_set(0, "102"), {"dataset_id_mismatch": 1, **_PAIR}),
    "empty_image": Fault(_image(lambda _: b""), {"image_empty": 1, **_PAIR}),
    "truncated_image": Fault(_image(lambda data: data[: len(data) // 2]), {"image_corrupt": 1, **_PAIR}),
    "image_without_eoi": Fault(_image(lambda data: data[:-2]), {"image_corrupt": 1, **_PAIR}),
    "png_named_jpg": Fault(_image(lambda _: pillow_image("RGB", (32, 32), "PNG")), {"image_not_jpeg": 1, **_PAIR}),
    "cmyk": Fault(_image(lambda _: pillow_image("CMYK", (32, 32), "JPEG")), {"image_colorspace": 1, **_PAIR}),
    "huge_header": Fault(_image(lambda data: resized_header(data, 65500, 65500)), {"image_too_large": 1, **_PAIR}),
    "one_pixel": Fault(_image(lambda _: pillow_image("RGB", (1, 1), "JPEG")), {"image_too_small": 1, **_PAIR}),
    "both_bad": Fault(
        lambda entries: _replace(_replace(entries, 0, b"junk"), 1, b""), {"image_not_jpeg": 1, "text_empty": 1}
    ),
}


def main() -> None:
    """Write the whole catalogue."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    entries = street_view(101, arguments.seed)
    sound: dict[str, bytes] = {
        "nested": tar_bytes(entries),
        "flat_aligned": tar_bytes(street_view(101, arguments.seed, layout="flat", aligned=True), "pax"),
    }
    catalogue = {
        **{f"sound/{name}": data for name, data in sound.items()},
        **{f"damage/{name}": damage(sound["nested"]) for name, damage in DAMAGES.items()},
        **{f"fault/{name}": tar_bytes(fault.change(entries)) for name, fault in FAULTS.items()},
    }
    for name, data in catalogue.items():
        path = arguments.folder / name / "0101.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
