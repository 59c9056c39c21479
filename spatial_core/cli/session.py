"""What every command shares: settings from its options, progress and logs on stderr, the report on stdout."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spatial_core.config.settings import CONFIG_VARIABLE, Settings, load_settings, settings_file
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.report import Report

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Settings file. Default: the one SPATIAL_CONFIG names, else ./config.toml."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting. May be given several times."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout; logs stay on stderr.")]

_WIDEST = 10_000  # columns of text


def plain_console(*, stderr: bool = False, width: int | None = None) -> Console:
    """A console that shows every text as it is, in tables too.

    What commands show are names of files, values and causes of failures, where `[x]` is no markup and `:x:` no emoji.
    What is to be coloured is a `Text`.
    """
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


STDERR = plain_console(stderr=True)
STDOUT = plain_console()


def note(text: str) -> None:
    """One line on stderr that is worth knowing and stops nothing."""
    STDERR.print(Text.assemble(("note:", "yellow"), f" {text}"), soft_wrap=True)


def read_settings(config: Path | None, overrides: list[str] | None) -> Settings:
    """Settings of a command; says on stderr which keys of an older file are mapped or unused."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=STDERR, show_path=False)], force=True
    )
    logging.getLogger("faiss").setLevel(logging.WARNING)
    settings = load_settings(config, overrides or ())
    for text in settings.notices():
        note(text)
    return settings


def read_lake_settings(config: Path | None, overrides: list[str] | None) -> Settings:
    """As `read_settings`, for commands that look at the lake: in the wrong folder they would find an empty one."""
    settings = read_settings(config, overrides)
    if settings_file(config) is None:
        note(
            f"no settings file: no --config, no {CONFIG_VARIABLE}, and no config.toml in {Path.cwd()}; default "
            f"settings are used, with the lake in {settings.locations.data_dir}"
        )
    return settings


@dataclass
class LiveProgress:
    """A `Progress` drawn on a terminal; elsewhere one line whenever the message changes or a tenth is done."""

    title: str
    _bar: Progress | None = field(default=None, init=False)
    _task: int = field(default=0, init=False)
    _last: tuple[str, int] = field(default=("", -1), init=False)

    def __enter__(self) -> Self:
        if STDERR.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.fields[title]}", style="bold", markup=False),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=STDERR,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=None, title=self.title)
        return self

    def __call__(self, done: int, total: int | None, message: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[self._task], completed=done, total=total, description=message)
            return
        tenth = done * 10 // total if total else 0
        if (message, tenth) != self._last:
            self._last = (message, tenth)
            share = f" {done}/{total}" if total else ""
            STDERR.print(f"{self.title}: {message}{share}", soft_wrap=True)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()


def execute(stage: str, arguments: Mapping[str, Path | str | None], settings: Settings, as_json: bool) -> Report:
    """Run a stage with live progress and show its report."""
    given = {name: str(value) for name, value in arguments.items() if value is not None}
    with LiveProgress(stage) as progress:
        report = run_stage(StageCall(stage, given, settings), progress)
    show(report, as_json)
    return report


def show(report: Report, as_json: bool) -> None:
    """The report on stdout, as JSON or as a small table; what it has to note on stderr."""
    for text in report.details.get("notes", ()):
        note(text)
    if as_json:
        sys.stdout.write(json.dumps(report.to_json(), indent=2, sort_keys=True) + "\n")
        return
    table = Table(title=f"{report.stage}: {'up to date' if report.up_to_date else 'done'}", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(report.rejected.items()) if count)
    table.add_row("artifact", str(report.artifact))
    table.add_row("rows", f"{report.rows:,}")
    table.add_row(
        report.unit, f"{report.rows_in:,} read = {report.kept:,} kept + {sum(report.rejected.values()):,} rejected"
    )
    if rejected:
        table.add_row("rejected", rejected)
    table.add_row("size", f"{report.bytes / 1e6:,.1f} MB")
    table.add_row("seconds", f"{report.seconds:.1f}")
    for name, value in report.details.items():
        if isinstance(value, (str, int, float)):
            table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
    STDOUT.print(table)


def print_table(table: Table) -> None:
    """A table on stdout: no wider than a terminal, but in full where a file or a program reads it."""
    if STDOUT.is_terminal:
        STDOUT.print(table)
        return
    natural = Measurement.get(STDOUT, STDOUT.options.update(width=_WIDEST), table).maximum
    plain_console(width=max(STDOUT.width, natural)).print(table)


def headline(report: Report, write: Callable[[Table], None]) -> None:
    """The retrieval table of an evaluation: one row a split and method."""
    rows = report.details.get("headline", [])
    if not rows:
        return
    ks = [name for name in rows[0] if name.startswith("recall@") and not name.endswith("_ci")]
    ks.sort(key=lambda name: int(name.removeprefix("recall@")))  # read from a manifest, they stand by the alphabet
    table = Table(title="same-building retrieval on held-out buildings (R@k = recall@k)")
    for name in ("split", "method", *(name.replace("recall", "R") for name in ks), "mAP", "MRR"):
        table.add_column(name)
    for row in rows:
        cells = [row.get(name) for name in (*ks, "mAP", "MRR")]
        table.add_row(row["split"], row["method"], *("-" if cell is None else f"{cell:.3f}" for cell in cells))
    write(table)
