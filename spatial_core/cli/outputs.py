"""Where a command may write: a folder where it makes a folder, a .parquet file where it makes a file.

A name that says otherwise is a slip (`--output out.csv`), which would only show when the result is looked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spatial_core.errors import ConfigError

# Endings that no folder has by intention; a dot in a folder's name is otherwise fine (`run.2`).
_FILE_ENDINGS = frozenset(
    {
        *(
            ".arrow",
            ".csv",
            ".feather",
            ".ipc",
            ".json",
            ".jsonl",
            ".ndjson",
            ".orc",
            ".parquet",
            ".tsv",
            ".txt",
            ".xlsx",
        ),
        *(".bin", ".ckpt", ".h5", ".hdf5", ".npy", ".npz", ".onnx", ".pickle", ".pkl", ".pt", ".pth", ".safetensors"),
        *(".bz2", ".gz", ".tar", ".tgz", ".xz", ".zip", ".zst", ".db", ".duckdb", ".sqlite", ".log", ".py", ".toml"),
        *(".gif", ".html", ".jpeg", ".jpg", ".md", ".pdf", ".png", ".xml", ".yaml", ".yml"),
    }
)


def folder(path: Path) -> Path:
    """The path, if a folder can be meant by it.

    Raises:
        ConfigError: if it is a file, or named like one.
    """
    if path.is_file():
        raise ConfigError(f"--output {path}: is a file; this command writes a folder")
    if not path.is_dir() and path.suffix.lower() in _FILE_ENDINGS:
        raise ConfigError(f"--output {path}: this command writes a folder, and {path.suffix} is the ending of a file")
    return path


def data_set_folder(path: Path) -> Path:
    """As `folder`, but `.parquet` is good too.

    A folder of parquet parts may be called so, and beside an existing file of that name the data set goes to
    `<path>.parts`.

    Raises:
        ConfigError: as `folder`; CSV cannot hold what is written.
    """
    return path if path.suffix.lower() == ".parquet" else folder(path)


def parquet_file(path: Path) -> Path:
    """The path, if it is named as the parquet file that it will be.

    Raises:
        ConfigError: if it is a folder, or has another ending.
    """
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; this command writes a file, such as {path / 'table.parquet'}")
    if path.suffix.lower() != ".parquet":
        raise ConfigError(f"--output {path}: this command writes a parquet file; let its name end in .parquet")
    return path


OutputDir = Annotated[
    Path, typer.Option("--output", "-o", callback=folder, help="Folder the artifact is written to; made if missing.")
]
DataSetDir = Annotated[
    Path, typer.Option("--output", "-o", callback=data_set_folder, help="Data set folder: state.json and parts/.")
]
OutputFile = Annotated[
    Path, typer.Option("--output", "-o", callback=parquet_file, help="Parquet file the artifact is written to.")
]
