"""Memory that is left, in control groups of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatial_core.storage import hardware


def group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def test_the_tightest_group_counts_and_page_cache_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = {"memory.max": "9000000\n", "memory.current": "1000000\n", "memory.stat": "anon 5\nfile 0\n"}
    inner = {"memory.max": "5000000\n", "memory.current": "4000000\n", "memory.stat": "anon 5\nfile 2500000\n"}
    group(tmp_path / "job", outer)
    group(tmp_path / "job/step", inner)
    group(tmp_path / "job/free", {"memory.max": "max\n", "memory.current": "0\n", "memory.stat": "file 0\n"})
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "_own_groups", lambda: "0::/job/step\n")
    assert hardware.available_memory() == 3_500_000
    monkeypatch.setattr(hardware, "_own_groups", lambda: "0::/job/free\n")
    assert hardware.available_memory() == 8_000_000


def test_the_older_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.limit_in_bytes": "700", "memory.usage_in_bytes": "900", "memory.stat": "cache 1\ntotal_cache 50\n"}
    group(tmp_path / "memory/job", files)
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    monkeypatch.setattr(hardware, "_own_groups", lambda: "3:cpu:/\n4:memory:/job\n0::/\n")
    assert hardware.available_memory() == 0


def test_this_machine_has_some() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < hardware.available_memory() <= int(total.split()[1]) * 1024
