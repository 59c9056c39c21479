"""Where a command may write: a folder where it makes a folder, a .parquet file where it makes a file.

A name that says otherwise is a slip (`--output out.csv`), which would only show when the result is looked for. Names
like `.` and `..` get that of the folder they stand for, because locks and manifests are called after it.
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
    """The path, under its own name, if a folder can be meant by it.

    Raises:
        ConfigError: if it is a file, named like one, or the root of the file system.
    """
    if path.name in {"", ".."}:
        named = path.resolve()
        if not named.name:
            raise ConfigError(f"--output {path}: is the root of the file system; name a folder in it")
        return named
    if path.is_file():
        raise ConfigError(f"--output {path}: is a file; this command writes a folder")
    if not path.is_dir() and path.suffix.lower() in _FILE_ENDINGS:
        raise ConfigError(f"--output {path}: this command writes a folder, and {path.suffix} is the ending of a file")
    return path


def replaced_folder(path: Path) -> Path:
    """As `folder`, for a command that puts a new folder in the place of the old one.

    Raises:
        ConfigError: as `folder`, and if this process works in it: it would be left in a folder that is gone.
    """
    named = folder(path)
    if Path.cwd().is_relative_to(named.resolve()):
        raise ConfigError(
            f"--output {path}: the working folder lies there, and would be replaced as a whole; name a new folder, "
            f"such as {path / 'out'}"
        )
    return named


def data_set_folder(path: Path) -> Path:
    """As `replaced_folder`, but `.parquet` is good too.

    A folder of parquet parts may be called so, and beside an existing file of that name the data set goes to
    `<path>.parts`.

    Raises:
        ConfigError: as `replaced_folder`; CSV cannot hold what is written.
    """
    return path if path.suffix.lower() == ".parquet" else replaced_folder(path)


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
ReplacedDir = Annotated[
    Path,
    typer.Option(
        "--output", "-o", callback=replaced_folder, help="Folder of the artifact; an earlier one in it is replaced."
    ),
]
DataSetDir = Annotated[
    Path, typer.Option("--output", "-o", callback=data_set_folder, help="Data set folder: state.json and parts/.")
]
OutputFile = Annotated[
    Path, typer.Option("--output", "-o", callback=parquet_file, help="Parquet file the artifact is written to.")
]
