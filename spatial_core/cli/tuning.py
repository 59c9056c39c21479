"""Commands of a tuning study: the whole of it, or one more worker for one that runs elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spatial_core.cli.app import app
from spatial_core.cli.outputs import folder
from spatial_core.cli.session import ConfigOption, JsonOption, SetOption, execute, read_settings

Merged = Annotated[Path, typer.Option(help="Folder with train, val and test parquet.")]
Difficulty = Annotated[Path, typer.Option(help="Difficulty parquet.")]
StudyDir = Annotated[
    Path, typer.Option("--output", "-o", callback=folder, help="Folder of the study: study.json, study.html, trials/.")
]
_FILE_HELP = "File of mode 0600 that holds the URL of the study database."


@app.command()
def tune(
    merged: Merged,
    difficulty: Difficulty,
    output: StudyDir,
    storage_file: Annotated[Path | None, typer.Option(help=f"{_FILE_HELP} Default: as [tuning] says.")] = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Search the projector's hyper-parameters: tuning.workers processes share one Optuna study, study.json.

    Hopeless trials are ended while they train; killed workers lose nothing; a study can be continued. Without a
    database of your own a PostgreSQL is started for as long as it is needed. Then: `spatial train --study study.json`.
    """
    settings = read_settings(config, set_)
    arguments = {"merged_dir": merged, "difficulty": difficulty, "output_dir": output, "storage_file": storage_file}
    execute("tune", arguments, settings, json_)


@app.command("tune-worker")
def tune_worker(
    merged: Merged,
    difficulty: Difficulty,
    output: StudyDir,
    storage_file: Annotated[Path, typer.Option(help=_FILE_HELP)],
    worker: Annotated[str, typer.Option(help="Number of this worker, as in 07; no two may share one.")] = "00",
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Work on a study that others work on too, from any machine that reaches its database and the same folders."""
    settings = read_settings(config, set_)
    arguments: dict[str, Path | str] = {
        "merged_dir": merged,
        "difficulty": difficulty,
        "output_dir": output,
        "storage_file": storage_file,
        "worker": worker,
    }
    execute("tune-worker", arguments, settings, json_)


@app.command("tune-collect")
def tune_collect(
    merged: Merged,
    difficulty: Difficulty,
    output: StudyDir,
    storage_file: Annotated[Path, typer.Option(help=_FILE_HELP)],
    config: ConfigOption = None,
    set_: SetOption = None,
    json_: JsonOption = False,
) -> None:
    """Write down what a study has found so far: study.json and study.html."""
    settings = read_settings(config, set_)
    arguments = {"merged_dir": merged, "difficulty": difficulty, "output_dir": output, "storage_file": storage_file}
    execute("tune-collect", arguments, settings, json_)
