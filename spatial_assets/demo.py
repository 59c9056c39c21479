"""`make demo`: draws the city, materializes every asset through Dagster, and shows what came of it."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

import dagster as dg
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from spatial_assets.drive import AssetOutcome, DriveEvent, drive
from spatial_core.cli.session import STDOUT, headline
from spatial_core.config.settings import Settings, load_settings
from spatial_core.errors import SpatialError
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.report import Report

_EVERY_S = 10.0  # between two lines about one artifact, where there is no terminal


class Screen:
    """What is shown while the demo runs: a line for everything that is done, and on a terminal one that moves.

    Elsewhere, in a log file or in CI, what takes long says every few seconds how far it is.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Progress(
            SpinnerColumn(),
            TextColumn("{task.fields[title]:<28}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._spoke = 0.0
        self._waiting = ""
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()

    def begin(self, title: str) -> None:
        """Start the moving line of one artifact."""
        self._clear()
        self._task = self._live.add_task("", title=title, total=None)
        self._title, self._spoke = title, time.monotonic()

    def progress(self, done: int, total: int | None, message: str) -> None:
        """Advance the moving line."""
        if self._task is not None:
            self._live.update(self._task, completed=done, total=total, description=message)
        if not self._console.is_terminal and time.monotonic() - self._spoke >= _EVERY_S:
            self._spoke = time.monotonic()
            of = "" if total is None else f" of {total:,}"
            self.say("... ", "", f"{self._title:<28} {message}: {done:,}{of}")

    def wait(self, title: str, cause: str) -> None:
        """Another process is at this artifact; said once, it is tried again every few seconds."""
        if title != self._waiting:
            self._clear()
            self.say("wait", "yellow", f"{title:<28} {cause} (is `make dev` running?)")
        self._waiting = title

    def end(self, title: str, report: Report) -> None:
        """One artifact is there."""
        self._clear()
        done = "up to date" if report.up_to_date else f"{report.seconds:6.1f} s"
        self.say("done", "green", f"{title:<28} {report.rows:>8,} rows  {done}")

    def say(self, word: str, style: str, line: str) -> None:
        """A line that stays: seconds, a word in colour, and a text that is shown as it is."""
        seconds = f"{time.monotonic() - self._start:6.1f}"
        self._console.print(Text.assemble((seconds, "dim"), " ", (word, style), f" {line}"), soft_wrap=True)

    def on_event(self, event: DriveEvent) -> None:
        """Show what the driver does."""
        title = f"{event.asset} {event.partition}".rstrip()
        if event.kind == "registered":
            self.say("new ", "cyan", f"{event.asset} registered {event.message}")
        elif event.kind == "started":
            self.begin(title)
        elif event.kind == "progress":
            self.progress(event.done, event.total, event.message)
        elif event.kind == "waiting":
            self.wait(title, event.message)
        elif event.kind == "finished" and event.report is not None:
            self.end(title, event.report)
        elif event.kind == "failed":
            self._clear()
            self.say("fail", "red", f"{title}: {event.message}")

    def _clear(self) -> None:
        if self._task is not None:
            self._live.remove_task(self._task)
            self._task = None


def artifact_table(outcomes: Iterable[AssetOutcome]) -> Table:
    """Rows and seconds of every asset, partitions added up."""
    table = Table("asset", "artifacts", "rows", "seconds", title="artifacts")
    for name in ("artifacts", "rows", "seconds"):
        next(column for column in table.columns if column.header == name).justify = "right"
    by_asset: dict[str, list[AssetOutcome]] = {}
    for outcome in outcomes:
        by_asset.setdefault(outcome.asset, []).append(outcome)
    for asset, made in by_asset.items():
        seconds = sum(outcome.seconds for outcome in made)
        shown = "up to date" if all(outcome.up_to_date for outcome in made) else f"{seconds:.1f}"
        table.add_row(asset, str(len(made)), f"{sum(outcome.rows for outcome in made):,}", shown)
    return table


def run_demo(settings: Settings, instance: dg.DagsterInstance, console: Console) -> None:
    """Draw the city, drive the chain, show tables and the next command."""
    at = settings.locations
    with Screen(console) as screen:
        screen.begin("demo city")
        city = run_stage(StageCall("demo-data", {"output_dir": str(at.data_dir)}, settings), screen.progress)
        screen.end("demo city", city)
        outcomes = drive(None, instance, screen.on_event)
    console.print(artifact_table(outcomes))
    for outcome in outcomes:
        if outcome.asset == "retrieval_report":
            headline(outcome.report, console.print)
    made = {"report": at.report_dir / "report.html", "model": at.model_dir, "vectors": at.final_embeddings_dir}
    for name, path in made.items():
        console.print(Text(f"{name:<8} {path}"), soft_wrap=True)
    console.print(Text.assemble("next     ", ("make dev", "bold"), "   opens the asset graph on http://127.0.0.1:3000"))


def main() -> int:
    """Run the demo with `config.toml` of the working folder on the instance of DAGSTER_HOME."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        with dg.DagsterInstance.get() as instance:
            run_demo(load_settings(), instance, STDOUT)
    except SpatialError as error:
        STDOUT.print(Text.assemble(("error:", "red"), f" {' '.join(str(error).split())}"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        STDOUT.print("interrupted; run the same command again to go on")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
