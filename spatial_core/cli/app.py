"""The typer application that the command modules add to."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="spatial",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help=(
        "Turns street-view tars into a published 'same building' embedding model, and new images into vectors.\n\n"
        "The chain: **ingest** a tar, take **fingerprint**s and **embed** its images, **merge** all tars into splits, "
        "compute **difficulty**, **train**, **evaluate**, **publish**, then **embed-new** images. Every command can be "
        "run again: what is finished is found and kept, what was cut short goes on.\n\n"
        "Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage or settings."
    ),
)
