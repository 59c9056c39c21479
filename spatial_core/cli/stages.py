"""One command a stage; each only resolves settings and calls the stage through the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spatial_core.cli.app import app
from spatial_core.cli.outputs import DataSetDir, OutputDir, OutputFile, ReplacedDir
from spatial_core.cli.session import (
    STDOUT,
    ConfigOption,
    JsonOption,
    SetOption,
    execute,
    headline,
    read_settings,
)

Tar = Annotated[Path, typer.Argument(help="Raw tar, named NNNN.tar.", show_default=False)]
Intermediates = Annotated[Path, typer.Option(help="The tar's NNNN.parquet, made by `spatial ingest`.")]


@app.command()
def ingest(
    tar: Tar, output: OutputDir, config: ConfigOption = None, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Read a raw tar once, strictly: NNNN.parquet (one row an image) and NNNN_rejects.parquet (one row a reject).

    Nothing is extracted. Every image is fully decoded; a structurally damaged tar is refused with offset and cause.
    """
    settings = read_settings(config, set_)
    execute("ingest", {"tar": tar, "output_dir": output}, settings, json_)


@app.command()
def fingerprint(
    tar: Tar,
    intermediates: Intermediates,
    output: OutputDir,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Shrink every image to a 16x16 RGB fingerprint: NNNN_fingerprints.parquet."""
    settings = read_settings(config, set_)
    execute("fingerprint", {"tar": tar, "intermediates": intermediates, "output_dir": output}, settings, json_)


@app.command()
def embed(
    tar: Tar,
    intermediates: Intermediates,
    output: OutputDir,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Run every image through the backbone: NNNN_embeddings.parquet.

    The model is [embedding_model] of the settings: a hub id, a local folder, or seeded:<name>. Runs on a GPU when there
    is one. A killed run goes on from its finished pieces.
    """
    settings = read_settings(config, set_)
    execute("embed", {"tar": tar, "intermediates": intermediates, "output_dir": output}, settings, json_)


@app.command()
def merge(
    embeddings: Annotated[Path, typer.Option(help="Folder of *_embeddings.parquet files.")],
    output: ReplacedDir,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Divide all buildings into train, val and test: three parquet files. A building never changes its split."""
    settings = read_settings(config, set_)
    execute("merge", {"embeddings_dir": embeddings, "output_dir": output}, settings, json_)


@app.command()
def difficulty(
    fingerprints: Annotated[Path, typer.Option(help="Folder of *_fingerprints.parquet files.")],
    output: OutputFile,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Find every image's look-alikes and sort them into difficulty bands: one parquet file."""
    settings = read_settings(config, set_)
    execute("difficulty", {"fingerprints_dir": fingerprints, "output_file": output}, settings, json_)


@app.command()
def train(
    merged: Annotated[Path, typer.Option(help="Folder with train, val and test parquet.")],
    difficulty: Annotated[Path, typer.Option(help="Difficulty parquet.")],
    output: OutputDir,
    study: Annotated[
        Path | None, typer.Option(help="study.json of `spatial tune`: train with the best trial's hyper-parameters.")
    ] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Train the projector with difficulty-guided triplets: checkpoint_best, checkpoint_final, checkpoint_epoch_N."""
    settings = read_settings(config, set_)
    arguments = {"merged_dir": merged, "difficulty": difficulty, "output_dir": output, "study": study}
    execute("train", arguments, settings, json_)


@app.command()
def evaluate(
    merged: Annotated[Path, typer.Option(help="Folder with train, val and test parquet.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint: .safetensors, or .pt of the earlier pipeline.")],
    output: ReplacedDir,
    difficulty: Annotated[Path | None, typer.Option(help="Difficulty parquet, for recall by band.")] = None,
    intermediates: Annotated[Path | None, typer.Option(help="Folder of NNNN.parquet, for thumbnails.")] = None,
    raw: Annotated[Path | None, typer.Option(help="Folder of raw tars, for thumbnails.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure same-building retrieval on held-out buildings, beside raw features, PCA and chance."""
    settings = read_settings(config, set_)
    arguments: dict[str, Path | str | None] = {
        "merged_dir": merged,
        "checkpoint": checkpoint,
        "output_dir": output,
        "difficulty": difficulty,
        "intermediates_dir": intermediates,
        "raw_dir": raw,
    }
    report = execute("evaluate", arguments, settings, json_)
    if not json_:
        headline(report, STDOUT.print)


@app.command()
def publish(
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of the projector.")],
    output: ReplacedDir,
    report: Annotated[Path | None, typer.Option(help="Folder of `spatial evaluate`, for the model card.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write a Hugging Face model folder that plain transformers loads; push it when publishing.repo_id is set."""
    settings = read_settings(config, set_)
    execute("publish", {"checkpoint": checkpoint, "output_dir": output, "report_dir": report}, settings, json_)


@app.command("embed-new")
def embed_new(
    input_: Annotated[
        Path, typer.Argument(metavar="INPUT.parquet", help="Columns image_bytes (JPEG), OSMID, optional is_valid.")
    ],
    output: DataSetDir,
    model: Annotated[
        str | None, typer.Option(help="Published model folder, or hub id@commit. Default: paths.model_dir.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward pass.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Embed at most this many rows.")] = None,
    filter_valid: Annotated[bool | None, typer.Option(help="Skip rows whose is_valid is false.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Turn a parquet of new images into vectors, resumably. Bad rows are listed in rejects.parquet, never lost."""
    shortcuts = {
        "inference.batch_size": batch_size,
        "inference.limit": limit,
        "inference.filter_valid": None if filter_valid is None else str(filter_valid).lower(),
        "infrastructure.device": device,
    }
    overrides = [f"{name}={value}" for name, value in shortcuts.items() if value is not None]
    settings = read_settings(config, [*(set_ or []), *overrides])
    execute("embed-new", {"input": input_, "model": model, "output_dir": output}, settings, json_)


@app.command("pool-buildings")
def pool_buildings(
    embeddings: Annotated[Path, typer.Option(help="Data set folder of `spatial embed-new`.")],
    output: OutputFile,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Average a data set's image vectors into one vector an OSMID: one parquet file."""
    settings = read_settings(config, set_)
    execute("pool-buildings", {"embeddings_dir": embeddings, "output_file": output}, settings, json_)


@app.command("demo-data")
def demo_data(
    output: OutputDir, config: ConfigOption = None, set_: SetOption = None, json_: JsonOption = False
) -> None:
    """Draw a small seeded city: raw/NNNN.tar in the layout of the real data set, and drops/new_images.parquet."""
    settings = read_settings(config, set_)
    execute("demo-data", {"output_dir": output}, settings, json_)
