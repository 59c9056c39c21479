"""Packaged parquet -> vectors: decode, resize and forward overlapped, beside one step after another.

The reference is the earlier pipeline's method, written from its specification: record batches through pandas, Pillow
decode, transformers' own processor a batch at a time, forward pass, lists of float32 in one parquet a record batch.
Both run the same published model, whose backbone is one layer of width 32 on 224 pixels, next to nothing: what is
measured is everything around the model. Ours also checks the model's digests and golden vectors, hashes the drop, and
writes checksummed parts.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Prepared, Row, compare, main
from spatial_core.config.settings import Settings, load_settings
from spatial_core.storage.hardware import share_cores

IMAGES = 1500
SIDE_PX = 640
READ_BATCH = 500
BATCH = 32
_MAX_DIFFERENCE = 0.05


class Task(NamedTuple):
    """What both contenders start from."""

    drop: Path
    model: Path


def make_task(folder: Path, images: int) -> Task:
    """A drop of 640 x 640 JPEGs of some 90 KB, and a model folder made by the publishing stage."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = _pictures()
    table = pa.table(
        {
            "image_bytes": pa.array([pictures[row % len(pictures)] for row in range(images)], pa.binary()),
            "OSMID": [f"way/{row // 3}" for row in range(images)],
        }
    )
    pq.write_table(table, folder / "drop.parquet", row_group_size=1000, compression="snappy")
    return Task(folder / "drop.parquet", _make_model(folder))


def _pictures() -> list[bytes]:
    """Sixteen 640 x 640 pictures with detail at every scale, some 90 KB each, as the data set's are."""
    import simplejpeg

    rng = np.random.default_rng(20)
    found = []
    for _ in range(16):
        pixels = np.full((SIDE_PX, SIDE_PX, 3), rng.integers(60, 200, 3), np.float64)
        for cell, contrast in ((80, 40), (16, 25), (2, 12), (1, 3)):
            pixels += np.kron(rng.normal(0, contrast, (SIDE_PX // cell,) * 2), np.ones((cell, cell)))[..., None]
        array = np.ascontiguousarray(np.clip(pixels, 0, 255).astype(np.uint8))
        found.append(simplejpeg.encode_jpeg(array, 74, "RGB", "420"))
    return found


def _make_model(folder: Path) -> Path:
    import json

    import torch
    from transformers import Dinov2Config, Dinov2Model

    from spatial_core.backbones.families.dinov2 import FAMILY
    from spatial_core.backbones.loading import load_backbone
    from spatial_core.metric_learning.checkpoint import Backbone, Checkpoint, save_checkpoint
    from spatial_core.metric_learning.projector import Projector, ProjectorConfig
    from spatial_core.publishing.model_folder import publish_model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=1, patch_size=28, image_size=224)
    Dinov2Model(config).save_pretrained(folder / "backbone")
    pixels = next(iter(FAMILY.demos.values())).preprocessor
    (folder / "backbone" / "preprocessor_config.json").write_text(json.dumps(dict(pixels)))
    backbone = load_backbone(str(folder / "backbone"), cache_dir=folder)
    head = Checkpoint(
        Projector(ProjectorConfig(backbone.dim, (64,))).eval(),
        epoch=1,
        backbone=Backbone(backbone.describe(), backbone.preprocessing.id),
    )
    save_checkpoint(folder / "head.safetensors", head)
    publish_model(folder / "head.safetensors", folder / "model", _settings(folder))
    return folder / "model"


def _settings(folder: Path) -> Settings:
    overrides = (
        f"paths.data_dir={folder / 'lake'}",
        f"embedding_model.model_name={folder / 'backbone'}",
        "infrastructure.device=cpu",
        f"inference.read_batch_size={READ_BATCH}",
        f"inference.batch_size={BATCH}",
    )
    return load_settings(None, overrides, environ={})


def load_ours(task: Task) -> Task:
    """Imports, which are not timed, in the way `run_stage` prepares a process."""
    share_cores()
    import transformers.models.dinov2.modeling_dinov2  # noqa: F401

    import spatial_core.inference.embed_new  # noqa: F401

    return task


def load_reference(task: Task) -> tuple[Task, Any, Any]:
    """Imports and the model, which are not timed."""
    import pandas  # noqa: F401
    import PIL.Image
    from transformers import AutoImageProcessor, AutoModel

    PIL.Image.init()
    model = AutoModel.from_pretrained(task.model, trust_remote_code=True).eval()
    return task, model, AutoImageProcessor.from_pretrained(task.model, trust_remote_code=False)


def ours(task: Task) -> dict[str, Any]:
    """The stage as it is."""
    from spatial_core.inference.embed_new import embed_parquet

    folder = task.drop.parent
    with tempfile.TemporaryDirectory(dir=folder) as output:
        report = embed_parquet(task.drop, Path(output) / "data_set", _settings(folder), model=str(task.model))
        return {"rows": report.rows, "sample": _sample(report.artifact / "parts")}


def reference(loaded: tuple[Task, Any, Any]) -> dict[str, Any]:
    """Read, decode, prepare, embed, write: one after another."""
    import pandas as pd
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    task, model, processor = loaded
    rows = 0
    with tempfile.TemporaryDirectory(dir=task.drop.parent) as output:
        for number, batch in enumerate(pq.ParquetFile(task.drop).iter_batches(batch_size=READ_BATCH)):
            table = batch.to_pandas()
            vectors = []
            for start in range(0, len(table), BATCH):
                data = table["image_bytes"].iloc[start : start + BATCH]
                images = [Image.open(io.BytesIO(item)).convert("RGB") for item in data]
                with torch.no_grad():
                    outputs = model(**processor(images=images, return_tensors="pt"))
                vectors += [vector.tolist() for vector in outputs.embeddings]
            part = pd.DataFrame({"OSMID": table["OSMID"], "embedding": vectors})
            part.to_parquet(Path(output) / f"rg00000_rb{number:05d}.parquet")
            rows += len(part)
        return {"rows": rows, "sample": _sample(Path(output))}


def _sample(parts: Path) -> list[list[float]]:
    import pyarrow.parquet as pq

    first = min(parts.glob("*.parquet"))
    sample: list[list[float]] = pq.read_table(first, columns=["embedding"]).slice(0, 16)["embedding"].to_pylist()
    return sample


def _compared(row: Row) -> Row:
    """The row with how far apart the vectors are in place of the samples.

    Raises:
        RuntimeError: if a contender lost images, or they do not agree.
    """
    figures = [dict(cost.figures) for cost in (row.ours, row.reference)]
    found, expected = (np.array(each.pop("sample")) for each in figures)
    difference = float(np.abs(found - expected).max())
    if {each["rows"] for each in figures} != {row.ours.items} or not difference <= _MAX_DIFFERENCE:
        raise RuntimeError(f"{row.stage}: {figures} of {row.ours.items} images, vectors differ by {difference}")
    ours = replace(row.ours, figures={**figures[0], "largest_difference": difference})
    return replace(row, ours=ours, reference=replace(row.reference, figures=figures[1]))


def rows(scale: float = 1.0) -> list[Row]:
    """Images a second from a packaged parquet to a data set of vectors."""
    images = max(64, int(IMAGES * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-new-data-"))
    try:
        task = make_task(folder, images)
        row = compare(
            "new data, stub model",
            "images",
            Prepared(partial(load_ours, task), ours),
            Prepared(partial(load_reference, task), reference),
            images,
            rounds=3,
            target=2.5,
        )
    finally:
        shutil.rmtree(folder)
    return [_compared(row)]


if __name__ == "__main__":
    main(rows)
