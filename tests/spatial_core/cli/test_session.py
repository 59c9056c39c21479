"""What commands show of a report."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spatial_core.cli import session
from spatial_core.cli.session import LiveProgress, headline, plain_console
from spatial_core.report import Report


def test_recall_stands_by_its_number_however_the_report_was_kept() -> None:
    row = {"split": "test", "method": "projector", "mAP": 0.5, "MRR": None, "recall@5_ci": [0, 1]}
    row |= {f"recall@{k}": 0.25 for k in (1, 10, 100, 5)}
    shown: list[Table] = []
    headline(Report("evaluate", Path("report"), 1, 1, 1, details={"headline": [row]}), shown.append)
    (table,) = shown
    assert [column.header for column in table.columns] == [
        "split", "method", "R@1", "R@5", "R@10", "R@100", "mAP", "MRR",
    ]  # fmt: skip
    assert [next(iter(column.cells)) for column in table.columns][2:] == ["0.250"] * 4 + ["0.500", "-"]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A terminal instead of stderr, which keeps what is written to it."""
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    console = plain_console(width=200)
    console.file = io.StringIO()
    monkeypatch.setattr(session, "STDERR", console)
    return console


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_moving_line_shows_texts_as_they_are(terminal: Console) -> None:
    with LiveProgress("ingest") as progress:
        progress(1, 2, "a[/x]b[i] :smile:")
    assert "a[/x]b[i] :smile:" in written(terminal)


def test_notes_are_one_line_of_any_text(terminal: Console) -> None:
    session.note("a[/x]b[i] :smile: " * 20)
    shown = Text.from_ansi(written(terminal)).plain
    assert shown.splitlines() == ["note: " + "a[/x]b[i] :smile: " * 20]
