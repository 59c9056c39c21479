"""What commands show of a report."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from spatial_core.cli.session import headline
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
