"""The whole suite as `make test` runs it: what needs SLURM beside everything else, and one coverage report.

Tests on the cluster mostly wait, the others mostly compute; side by side they take about as long as the longer half.
Options of pytest are handed to both (`python -m tests.run -k resume`); the second half's output is shown when it ends.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.conftest import PART_VARIABLE

REPOSITORY = Path(__file__).parents[1]
FINE = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}


def main(options: list[str]) -> int:
    """Run both halves; 0 only when neither failed and at least one had tests."""
    with tempfile.TemporaryFile("w+") as shown_later:
        beside = _start("slurm", options, stdout=shown_later)
        rest = _start("rest", options).wait()
        slurm = beside.wait()
        shown_later.seek(0)
        sys.stdout.write(f"\n--- tests on SLURM ---\n{shown_later.read()}")
        sys.stdout.flush()
    measured = [str(path) for part in ("rest", "slurm") if (path := _coverage_file(part)).exists()]
    if measured:
        for command in (["combine", *measured], ["report"]):
            subprocess.run([sys.executable, "-m", "coverage", *command], cwd=REPOSITORY, check=True)
    codes = {rest, slurm}
    return max(codes - FINE, default=min(codes))


def _start(part: str, options: list[str], stdout: object = None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, PART_VARIABLE: part, "COVERAGE_FILE": str(_coverage_file(part))}
    cache = f"cache_dir=.pytest_cache/{part}"
    argv = [sys.executable, "-m", "pytest", "--cov", "--cov-report=", "-o", cache, *options]
    return subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stdout=stdout, stderr=stdout)  # type: ignore[arg-type]


def _coverage_file(part: str) -> Path:
    return REPOSITORY / f".coverage-{part}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
