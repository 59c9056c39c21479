"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PART_VARIABLE = "SPATIAL_TEST_PART"
"""`slurm` keeps only what lies in tests/slurm, `rest` only what does not; unset keeps everything (see tests/run.py)."""


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures named by SPATIAL_REAL_DATA; tests that need it are skipped where it is unset."""
    named = os.environ.get("SPATIAL_REAL_DATA")
    if not named:
        pytest.skip("SPATIAL_REAL_DATA is unset: it names the folder with buildings/0201.tar and 0202.tar")
    return Path(named).resolve()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not even import the modules of the other half; one named on the command line is, and loses its tests below."""
    return True if collection_path.is_file() and not _in_this_half(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the half of the suite that this process is for."""
    config.hook.pytest_deselected(items=[item for item in items if not _in_this_half(item.path)])
    items[:] = [item for item in items if _in_this_half(item.path)]


def _in_this_half(path: Path) -> bool:
    part = os.environ.get(PART_VARIABLE)
    return part is None or path.is_relative_to(Path(__file__).parent / "slurm") == (part == "slurm")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI nothing may be skipped: a test that cannot run there is a hole in what CI proves."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if os.environ.get("CI") and skipped and exitstatus == 0:
        reporter.write_line(f"{len(skipped)} tests were skipped, which fails in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
