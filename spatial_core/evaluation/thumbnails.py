"""Small JPEGs of gallery images, read from the raw tars at the offsets that ingest recorded.

A picture that cannot be shown is no reason to fail a report whose figures stand: each has a reason instead, which the
page shows in its place. Names in reasons are file names, never folders, for the page is published.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import simplejpeg

from spatial_core.errors import ArtifactError, InputError, SpatialError
from spatial_core.images.byte_ranges import TarImages
from spatial_core.images.decode import decode_jpeg
from spatial_core.storage.parquet import open_parquet, stream_batches

_COLUMNS = ("streetview_image_id", "tar_file", "image_offset", "image_bytes", "image_sha256")
_BATCH_ROWS = 65_536
_SIDE_PX = 160  # a quarter of the data set's 640, which the decoder scales to directly
_QUALITY = 78


@dataclass(frozen=True)
class Thumbnails:
    """Pictures by image id.

    Args:
        pictures: image id -> data URI of a JPEG.
        reasons: image id -> why there is none.
        missing: names of the tars and intermediates files that were looked for and are not there.
    """

    pictures: dict[str, str]
    reasons: dict[str, str]
    missing: tuple[str, ...] = ()


def read_thumbnails(
    images: Sequence[str], datasets: Sequence[int], intermediates_dir: Path, raw_dir: Path
) -> Thumbnails:
    """Thumbnails of the given images.

    Args:
        images: image ids.
        datasets: data set number of each.
        intermediates_dir: folder of NNNN.parquet with tar names, offsets and digests.
        raw_dir: folder of the tars.
    """
    pictures: dict[str, str] = {}
    reasons: dict[str, str] = {}
    missing: set[str] = set()
    for dataset in sorted(set(datasets)):
        wanted = [image for image, number in zip(images, datasets, strict=True) if number == dataset]
        name = f"{dataset:04d}.parquet"
        if not (intermediates_dir / name).is_file():
            missing.add(name)
            reasons |= dict.fromkeys(wanted, f"{name} is missing from the intermediates")
            continue
        try:
            places = _places(intermediates_dir / name, wanted)
        except InputError:
            reasons |= dict.fromkeys(wanted, f"{name} records no byte offsets")
            continue
        except ArtifactError:
            reasons |= dict.fromkeys(wanted, f"{name} is damaged")
            continue
        for tar_file in sorted(set(places.column("tar_file").to_pylist())):
            tar = raw_dir / Path(tar_file).name
            if not tar.is_file():
                missing.add(tar.name)
            _from_tar(tar, places.filter(pc.field("tar_file") == tar_file), pictures, reasons)
        unlisted = [image for image in wanted if image not in pictures and image not in reasons]
        reasons |= dict.fromkeys(unlisted, f"not listed in {name}")
    return Thumbnails(pictures, reasons, tuple(sorted(missing)))


def _places(path: Path, wanted: Sequence[str]) -> pa.Table:
    ids = pa.array(wanted, pa.string())
    schema = pa.schema([open_parquet(path, required=_COLUMNS).schema_arrow.field(name) for name in _COLUMNS])
    hits = [
        batch.filter(pc.is_in(batch.column("streetview_image_id"), value_set=ids)).select(_COLUMNS)
        for batch in stream_batches(path, _COLUMNS, _BATCH_ROWS)
    ]
    return pa.Table.from_batches(hits, schema=schema)


def _from_tar(tar: Path, places: pa.Table, pictures: dict[str, str], reasons: dict[str, str]) -> None:
    images = places.column("streetview_image_id").to_pylist()
    if not tar.is_file():
        reasons |= dict.fromkeys(images, f"{tar.name} is not in the raw folder")
        return
    try:
        with TarImages(tar) as source:
            for place in places.to_pylist():
                image = place["streetview_image_id"]
                try:
                    data = source.verified(place["image_offset"], place["image_bytes"], place["image_sha256"])
                    pictures[image] = _thumbnail(data)
                except SpatialError:
                    reasons[image] = f"{tar.name} changed since it was read"
    except SpatialError:
        reasons |= dict.fromkeys(images, f"{tar.name} cannot be opened")


def _thumbnail(data: memoryview) -> str:
    pixels = decode_jpeg(data, min_side_px=_SIDE_PX)
    small = simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorspace="RGB", colorsubsampling="420")
    return f"data:image/jpeg;base64,{base64.b64encode(small).decode()}"
