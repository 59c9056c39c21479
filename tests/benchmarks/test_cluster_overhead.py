"""The table of the cluster benchmark compares with the right local figure and says whether a bar is kept."""

from __future__ import annotations

from rich.console import Console

from benchmarks.cluster_overhead import shown


def test_bars_are_about_what_is_above_local_with_as_many_keys() -> None:
    walls = {
        "local 1 key": [1.0, 1.2, 5.0],
        "local 3 keys": [3.0, 3.0, 3.0],
        "slurm_login 1 key": [5.0, 5.1, 9.0],
        "slurm_login 3 keys": [8.0, 7.5, 7.4],
        "slurm_ssh 1 key": [8.0, 8.0, 8.0],
    }
    console = Console(width=120, record=True)
    console.print(shown(walls))
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:-1]
        for line in console.export_text().splitlines()
        if "key" in line
    }
    found = {name: [cell.strip() for cell in cells] for name, cells in rows.items()}
    assert found["slurm_login 1 key"] == ["5.10", "5.00", "3.90", "4, kept"]
    assert found["slurm_login 3 keys"] == ["7.50", "7.40", "4.50", "4, missed"]
    assert found["slurm_ssh 1 key"] == ["8.00", "8.00", "6.80", "7, kept"]
    assert found["local 1 key"] == ["1.20", "1.00", "0.00", ""]
