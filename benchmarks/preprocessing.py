"""JPEGs -> normalised pixels for a backbone: ours beside a processor called image by image in loader workers.

The reference is the earlier pipeline's method, written from its specification: images of an extracted tar, opened with
Pillow one at a time inside four DataLoader workers, each put through the model's own processor (transformers' Pillow
one). Extraction is not timed. Ours reads the same images out of the tar by offset, digests checked, decodes and resizes
in threads and normalises whole batches. Both yield batches of 16 normalised float32 images of DINOv2's size.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness import Prepared, Row, compare, main
from benchmarks.ingest import TAR_NAME, make_tar
from spatial_core.config.settings import Settings

IMAGES = 768
BATCH = 16
WORKERS = 4
# As published with facebook/dinov2-small.
PROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}


class Pictures(NamedTuple):
    """The same images twice: inside a tar with its intermediates, and as extracted files in row order."""

    tar: Path
    intermediates: Path
    files: tuple[Path, ...]


def make_pictures(folder: Path, images: int) -> Pictures:
    """Write and ingest a tar of 640 x 640 JPEGs, and extract it."""
    from spatial_core.street_view.ingest import ingest_tar

    tar = folder / TAR_NAME
    make_tar(tar, images)
    intermediates = ingest_tar(tar, folder / "intermediates", Settings()).artifact
    with tarfile.open(tar) as archive:
        archive.extractall(folder / "extracted", filter="data")
    names = pq.read_table(intermediates, columns=["image_path"])["image_path"].to_pylist()
    return Pictures(tar, intermediates, tuple(folder / "extracted" / name for name in names))


class ProcessedFiles:
    """A map-style data set: file -> (3, H, W) float32 through transformers' processor, one image a call."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        import transformers

        # Version 5 renamed the Pillow processor.
        kind = getattr(transformers, "BitImageProcessorPil", None) or transformers.BitImageProcessor
        options = {key: value for key, value in PROCESSOR.items() if key != "image_processor_type"}
        self._processor = kind(**options)
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        with Image.open(self._files[index]) as picture:
            return self._processor(images=picture.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def loader(files: tuple[Path, ...]) -> Any:
    """The reference's batches: (B, 3, H, W) float32 from worker processes."""
    from torch.utils.data import DataLoader

    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # four workers are the method's own
    data: Any = ProcessedFiles(files)
    # Forked as they are by default on Linux; the harness's own process would make them import everything again.
    return DataLoader(data, batch_size=BATCH, num_workers=WORKERS, multiprocessing_context="fork")


def load_ours(pictures: Pictures) -> Pictures:
    """Imports, which are not timed."""
    import spatial_core.backbones.engine
    import spatial_core.street_view.image_rows  # noqa: F401

    return pictures


def load_reference(pictures: Pictures) -> Pictures:
    """Imports, which are not timed."""
    ProcessedFiles(pictures.files)[0]
    return pictures


def ours(pictures: Pictures) -> dict[str, Any]:
    """The engine, with a model that only hands one pixel of every image through."""
    from spatial_core.backbones.engine import stream_features
    from spatial_core.backbones.preprocessing import parse_preprocessing
    from spatial_core.images.byte_ranges import TarImages
    from spatial_core.storage.hardware import usable_cores
    from spatial_core.street_view.image_rows import LOCATORS, byte_readers, row_blocks

    with TarImages(pictures.tar) as images:
        block = next(row_blocks(pictures.intermediates, pictures.tar, LOCATORS, len(pictures.files)))
        stream = stream_features(
            lambda pixels: pixels[:, :, 100, 100],
            parse_preprocessing(PROCESSOR, "benchmark"),
            enumerate(byte_readers(images, block)),
            batch_size=BATCH,
            threads=usable_cores(),
        )
        return _figures([batch.vectors for batch in stream])


def reference(pictures: Pictures) -> dict[str, Any]:
    """Loader workers, one image at a time."""
    return _figures([batch[:, :, 100, 100].numpy() for batch in loader(pictures.files)])


def _figures(batches: list[Any]) -> dict[str, Any]:
    values = np.concatenate(batches)
    return {"images": len(values), "sample": values[:16].tolist()}


def check_same_pixels(row: Row) -> None:
    """Compare one pixel of sixteen images.

    Raises:
        RuntimeError: if they are more than a grey level apart, or images were lost.
    """
    for cost in (row.ours, row.reference):
        if cost.figures["images"] != cost.items:
            raise RuntimeError(f"{cost.figures['images']} images came through of {cost.items}")
    found, expected = (np.array(cost.figures["sample"]) for cost in (row.ours, row.reference))
    grey_levels = np.abs(found - expected) * np.array(PROCESSOR["image_std"]) * 255
    if grey_levels.max() > 1.01:
        raise RuntimeError(f"{grey_levels.max():.2f} grey levels between ours and the reference")


def rows(scale: float = 1.0) -> list[Row]:
    """One row: images a second of both."""
    images = max(48, int(IMAGES * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-preprocessing-"))
    try:
        pictures = make_pictures(folder, images)
        row = compare(
            "preprocessing",
            "images",
            Prepared(partial(load_ours, pictures), ours),
            Prepared(partial(load_reference, pictures), reference),
            images,
            rounds=3,
            target=3.5,
        )
    finally:
        shutil.rmtree(folder)
    check_same_pixels(row)
    return [row]


if __name__ == "__main__":
    main(rows)
