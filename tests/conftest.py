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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the half of the suite that this process is for."""
    part = os.environ.get(PART_VARIABLE)
    if part is None:
        return
    on_cluster = {item for item in items if item.path.is_relative_to(Path(__file__).parent / "slurm")}
    dropped = [item for item in items if (item in on_cluster) != (part == "slurm")]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if (item in on_cluster) == (part == "slurm")]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI nothing may be skipped: a test that cannot run there is a hole in what CI proves."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if os.environ.get("CI") and skipped and exitstatus == 0:
        reporter.write_line(f"{len(skipped)} tests were skipped, which fails in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
