"""Intermediates and tar -> fingerprints: images by offset, checked and in threads, beside extract, Pillow and pandas.

The reference is the earlier pipeline's method, written from its specification: the tar is extracted to a temporary
folder, each image is decoded and resized by Pillow one after another, and the vectors go to Parquet as lists of int64
through pandas. It checks no digest. Both start from the same intermediates, which are made before the clock starts.

The first line is ours on one thread, which is what is gained per core; the others use all cores.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Prepared, Row, compare, main
from benchmarks.ingest import TAR_NAME, make_tar
from spatial_core.config.settings import Settings

IMAGES = 1500
SIZE_PX = 16


class Task(NamedTuple):
    """What both contenders start from."""

    tar: Path
    intermediates: Path


def load_ours(task: Task) -> Task:
    """Imports, which are not timed; pyarrow imports pandas at its first conversion where that is installed."""
    import pandas  # noqa: F401

    import spatial_core.street_view.fingerprints  # noqa: F401

    return task


def load_reference(task: Task) -> Task:
    """Imports, which are not timed."""
    import pandas  # noqa: F401
    import PIL.Image
    import pyarrow.parquet  # noqa: F401

    PIL.Image.init()
    return task


def ours(mode: str, threads: int, task: Task) -> dict[str, Any]:
    """The stage as it is."""
    from spatial_core.street_view.fingerprints import fingerprint_tar

    settings = Settings(infrastructure={"threads": threads}, fingerprints={"image_size": SIZE_PX, "decode": mode})
    with tempfile.TemporaryDirectory(dir=task.tar.parent) as folder:
        report = fingerprint_tar(task.tar, task.intermediates, Path(folder), settings)
        return {"rows": report.rows, "bytes": report.bytes, "sample": _sample(report.artifact)}


def reference(task: Task) -> dict[str, Any]:
    """Extract, decode and resize one by one, collect with pandas."""
    import pandas as pd
    from PIL import Image

    with tempfile.TemporaryDirectory(dir=task.tar.parent) as folder:
        with tarfile.open(task.tar) as archive:
            archive.extractall(folder, filter="data")
        table = pd.read_parquet(task.intermediates)
        fingerprints = []
        for name in table["image_path"]:
            with Image.open(Path(folder) / name) as picture:
                small = picture.convert("RGB").resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
            fingerprints.append(np.asarray(small, np.uint8).flatten().astype(np.int64).tolist())
        table["fingerprint"] = fingerprints
        out = Path(folder) / "out.parquet"
        table.to_parquet(out, compression="snappy")
        return {"rows": len(table), "bytes": out.stat().st_size, "sample": _sample(out)}


def _sample(path: Path) -> list[list[int]]:
    """The first sixteen fingerprints, one of each picture that the tar is made of."""
    import pyarrow.parquet as pq

    batch = next(pq.ParquetFile(path).iter_batches(16, columns=["fingerprint"]))
    sample: list[list[int]] = batch.column(0).to_pylist()
    return sample


def _compared(row: Row, largest: int) -> Row:
    """The row with how far ours is from the reference, in grey levels, in place of the samples.

    Raises:
        RuntimeError: if a contender lost rows, or they differ by more than `largest`.
    """
    figures = [dict(cost.figures) for cost in (row.ours, row.reference)]
    for cost in (row.ours, row.reference):
        if cost.figures["rows"] != cost.items:
            raise RuntimeError(f"{row.stage}: {cost.figures['rows']} rows of {cost.items} images")
    found, expected = (np.array(each.pop("sample"), np.int64) for each in figures)
    difference = np.abs(found - expected)
    if difference.max() > largest:
        raise RuntimeError(f"{row.stage}: {difference.max()} grey levels off the reference, {largest} allowed")
    figures[0] |= {"grey_levels_max": int(difference.max()), "grey_levels_mean": float(difference.mean())}
    return replace(
        row, ours=replace(row.ours, figures=figures[0]), reference=replace(row.reference, figures=figures[1])
    )


def rows(scale: float = 1.0) -> list[Row]:
    """Exact on one thread, exact and scaled on all cores: images a second of ours and of the reference."""
    from spatial_core.street_view.ingest import ingest_tar

    images = max(50, int(IMAGES * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-fingerprints-"))
    measured = []
    try:
        task = Task(folder / TAR_NAME, folder / "intermediates" / f"{Path(TAR_NAME).stem}.parquet")
        make_tar(task.tar, images)
        ingest_tar(task.tar, task.intermediates.parent, Settings())
        for stage, mode, threads, target, largest in (
            ("fingerprints, exact, one thread", "exact", 1, 1.6, 1),
            ("fingerprints, exact", "exact", 0, 4.0, 1),
            ("fingerprints, scaled", "scaled", 0, 4.0, 8),
        ):
            row = compare(
                stage,
                "images",
                Prepared(partial(load_ours, task), partial(ours, mode, threads)),
                Prepared(partial(load_reference, task), reference),
                images,
                rounds=3,
                target=target,
            )
            measured.append(_compared(row, largest))
    finally:
        shutil.rmtree(folder)
    return measured


if __name__ == "__main__":
    main(rows)
