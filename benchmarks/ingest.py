"""Tar -> intermediates: one strict pass beside extract, Pillow decode and pandas.

The reference is the earlier pipeline's method, written from its specification: the tar is extracted to a temporary
folder, each text's `d` line is split into 18 tokens, the image of the same stem is decoded with Pillow, and the rows go
to Parquet through pandas. It checks neither the archive nor digests; ours does both, and writes 21 further columns.
"""

from __future__ import annotations

import io
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from benchmarks.harness import Prepared, Row, compare, main
from spatial_core.config.settings import Settings

TAR_NAME = "0101.tar"
IMAGES = 1500
SIDE_PX = 640


def make_tar(path: Path, images: int) -> None:
    """A tar of 640 x 640 facades of some 90 KB each, the data set's mean; sixteen pictures take turns."""
    rng = np.random.default_rng(20)
    pictures = [_facade(rng) for _ in range(16)]
    with tarfile.open(path, "w") as tar:
        for patch in range(images):
            stem = f"0101/0101/0101_{patch:07d}_{patch:07d}_{patch // 4:07d}"
            text = f"d 101 {patch // 4} {patch} {patch} 45.1 9.2 6.5 0.6 0.8 0 45.1001 9.2001 2.5 20.5 33.1 4.2 0\n"
            for suffix, data in ((".jpg", pictures[patch % 16]), (".txt", text.encode())):
                info = tarfile.TarInfo(stem + suffix)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def _facade(rng: np.random.Generator) -> bytes:
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    windows = ((x // rng.integers(20, 50)) % 2) & ((y // rng.integers(20, 50)) % 2)
    wall, glass = rng.integers(0, 256, (2, 3))
    texture = np.kron(rng.normal(0, 14, (SIDE_PX // 2, SIDE_PX // 2)), np.ones((2, 2)))
    pixels = np.where(windows[..., None], glass, wall) + texture[..., None] + rng.normal(0, 3, (SIDE_PX, SIDE_PX, 3))
    array = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
    encoded: bytes = simplejpeg.encode_jpeg(array, 74, "RGB", "420")
    return encoded


def load_ours(tar: Path) -> Path:
    """Imports, which are not timed."""
    import spatial_core.street_view.ingest  # noqa: F401

    return tar


def load_reference(tar: Path) -> Path:
    """Imports, which are not timed."""
    import pandas  # noqa: F401
    import PIL.Image
    import pyarrow.parquet  # noqa: F401

    PIL.Image.init()
    return tar


def ours(tar: Path) -> dict[str, Any]:
    """The stage as it is."""
    from spatial_core.street_view.ingest import ingest_tar

    with tempfile.TemporaryDirectory(dir=tar.parent) as folder:
        report = ingest_tar(tar, Path(folder), Settings())
        return {"rows": report.rows, "rejected": dict(report.rejected)}


def reference(tar: Path) -> dict[str, Any]:
    """Extract, decode one by one, collect with pandas."""
    import pandas as pd
    from PIL import Image

    with tempfile.TemporaryDirectory(dir=tar.parent) as folder:
        with tarfile.open(tar) as archive:
            archive.extractall(folder, filter="data")
        rows = []
        for text in sorted(Path(folder).rglob("*.txt")):
            tokens = text.read_text().split()
            image = text.with_suffix(".jpg")
            if len(tokens) != 18 or tokens[0] != "d" or not image.exists():
                continue
            with Image.open(image) as picture:
                picture.load()
            target, patch, street_view = (int(token) for token in tokens[2:5])
            rows.append(
                {
                    "dataset_id": int(tar.stem),
                    "target_id": target,
                    "patch_id": patch,
                    "street_view_id": street_view,
                    "target_lat": float(tokens[5]),
                    "target_lon": float(tokens[6]),
                    "building_id": f"{tar.stem}_{target}",
                    "streetview_image_id": f"{tar.stem}_{patch}",
                    "image_path": image.relative_to(folder).as_posix(),
                    "tar_file": tar.name,
                }
            )
        pd.DataFrame(rows).to_parquet(Path(folder) / "out.parquet", compression="snappy")
        return {"rows": len(rows)}


def rows(scale: float = 1.0) -> list[Row]:
    """One row: images a second of both."""
    images = max(50, int(IMAGES * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-ingest-"))
    try:
        tar = folder / TAR_NAME
        make_tar(tar, images)
        row = compare(
            "ingest",
            "images",
            Prepared(partial(load_ours, tar), ours),
            Prepared(partial(load_reference, tar), reference),
            images,
            rounds=3,
            target=3.0,
        )
    finally:
        shutil.rmtree(folder)
    if row.ours.figures["rows"] != row.reference.figures["rows"]:
        raise RuntimeError(f"ours kept {row.ours.figures['rows']} rows, the reference {row.reference.figures['rows']}")
    return [row]


if __name__ == "__main__":
    main(rows)
