"""Tar -> backbone features on the CPU: the embed stage beside loader workers and one fp32 pass after another.

The model has the shape of DINOv2-S (12 layers, width 384, 257 tokens) and seeded weights. The reference is the earlier
pipeline's method, written from its specification: the tar is extracted, images go one at a time through the model's
processor in four DataLoader workers, the model runs in fp32 on batches of 16, and the vectors go to Parquet as lists of
doubles through pandas. Ours is the stage as it is, in each precision it offers. Loading the model is timed in both.

Seven tenths of ours are matrix products, so the note gives the rate that these alone would allow.
"""

from __future__ import annotations

import json
import shutil
import tarfile
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness import Prepared, Row, compare, main
from benchmarks.matmul import matmul_flops, transformer_flops
from benchmarks.preprocessing import BATCH, PROCESSOR, Pictures, ProcessedFiles, loader, make_pictures
from spatial_core.config.settings import load_settings

IMAGES = 160
SHAPE: dict[str, Any] = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 224,
}


class Task(NamedTuple):
    """What both contenders start from."""

    pictures: Pictures
    model: Path


def make_model(folder: Path, shape: dict[str, Any] = SHAPE) -> Path:
    """A model folder of this shape with seeded weights, as transformers initialises them."""
    import torch
    from transformers import AutoModel, Dinov2Config

    torch.manual_seed(0)
    AutoModel.from_config(Dinov2Config(**shape)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def load_ours(task: Task) -> Task:
    """Imports, which are not timed."""
    import spatial_core.street_view.embeddings  # noqa: F401

    return task


def load_reference(task: Task) -> Task:
    """Imports, which are not timed."""
    import pandas  # noqa: F401
    import transformers.models.dinov2.modeling_dinov2  # noqa: F401

    ProcessedFiles(task.pictures.files)[0]
    return task


def ours(precision: str, task: Task) -> dict[str, Any]:
    """The stage as it is."""
    from spatial_core.storage.parquet import read_columns, vectors_to_numpy
    from spatial_core.street_view.embeddings import embed_tar

    with tempfile.TemporaryDirectory(dir=task.pictures.tar.parent) as folder:
        settings = load_settings(
            None,
            [
                f"paths.data_dir={folder}",
                f"embedding_model.model_name={task.model}",
                f"embedding_model.precision={precision}",
                f"embedding_model.batch_size={BATCH}",
                "infrastructure.device=cpu",
            ],
            environ={},
        )
        report = embed_tar(task.pictures.tar, task.pictures.intermediates, Path(folder), settings)
        vectors = vectors_to_numpy(read_columns(report.artifact, ["embedding"])["embedding"])
        return {"rows": report.rows, "bytes": report.bytes, "sample": vectors[:BATCH].tolist()}


def reference(task: Task) -> dict[str, Any]:
    """Extract, process image by image in workers, run in fp32, collect with pandas."""
    import pandas as pd
    import torch
    from transformers import AutoModel

    with tempfile.TemporaryDirectory(dir=task.pictures.tar.parent) as folder:
        with tarfile.open(task.pictures.tar) as archive:
            archive.extractall(folder, filter="data")
        table = pd.read_parquet(task.pictures.intermediates)
        files = tuple(Path(folder) / name for name in table["image_path"])
        model = AutoModel.from_pretrained(task.model).eval()
        vectors = []
        with torch.no_grad():
            for batch in loader(files):
                vectors.append(model(pixel_values=batch).last_hidden_state[:, 0].numpy())
        table["embedding"] = np.concatenate(vectors).astype(np.float64).tolist()
        out = Path(folder) / "out.parquet"
        table.to_parquet(out, compression="snappy")
        return {"rows": len(table), "bytes": out.stat().st_size, "sample": vectors[0].tolist()}


def with_agreement(row: Row, least_cosine: float) -> Row:
    """The row with the smallest cosine between ours and the reference's vectors in place of the samples.

    Raises:
        RuntimeError: if rows were lost, or a cosine is below `least_cosine`.
    """
    figures = [dict(cost.figures) for cost in (row.ours, row.reference)]
    for cost in (row.ours, row.reference):
        if cost.figures["rows"] != cost.items:
            raise RuntimeError(f"{row.stage}: {cost.figures['rows']} rows of {cost.items} images")
    found, expected = (np.array(each.pop("sample")) for each in figures)
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    if cosines.min() < least_cosine:
        raise RuntimeError(f"{row.stage}: cosine {cosines.min():.6f} to the reference, {least_cosine} required")
    figures[0]["cosine_min"] = float(cosines.min())
    return replace(
        row, ours=replace(row.ours, figures=figures[0]), reference=replace(row.reference, figures=figures[1])
    )


def limit() -> str:
    """Images a second if nothing but the matrix products were left, by precision, on all cores."""
    import torch
    from transformers import Dinov2Config

    flops = transformer_flops(Dinov2Config(**SHAPE), SHAPE["image_size"])
    shape = (BATCH * 257, SHAPE["hidden_size"], 4 * SHAPE["hidden_size"])
    rates = {
        name: matmul_flops(dtype, torch.device("cpu"), shape) / flops
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    return "matrix products alone: " + ", ".join(f"{rate:.1f}/s {name}" for name, rate in rates.items())


def rows(scale: float = 1.0) -> list[Row]:
    """A row a precision: images a second of ours and of the reference."""
    images = max(2 * BATCH, int(IMAGES * scale))
    folder = Path(tempfile.mkdtemp(prefix="bench-backbone-"))
    measured = []
    try:
        task = Task(make_pictures(folder, images), make_model(folder / "model"))
        note = limit()
        for precision, target, least_cosine in (("fp32", 1.4, 0.9999), ("tf32", 1.4, 0.999), ("bf16", 3.0, 0.999)):
            row = compare(
                f"backbone, {precision}",
                "images",
                Prepared(partial(load_ours, task), partial(ours, precision)),
                Prepared(partial(load_reference, task), reference),
                images,
                rounds=3,
                target=target,
                note=note,
            )
            measured.append(with_agreement(row, least_cosine))
    finally:
        shutil.rmtree(folder)
    return measured


if __name__ == "__main__":
    main(rows)
