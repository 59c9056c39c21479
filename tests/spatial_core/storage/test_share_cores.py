"""OpenMP's waiting threads: told to give way before torch is loaded, unless the user said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHILD = """
import os, sys
from spatial_core.jobs.registry import StageCall, run_stage
from spatial_core.config.settings import Settings
from spatial_core.errors import SpatialError
from pathlib import Path
assert "torch" not in sys.modules
try:
    run_stage(StageCall("pool-buildings", {"embeddings_dir": "nowhere", "output_file": "out.parquet"}, Settings()))
except SpatialError:
    pass
assert "torch" in sys.modules
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_stages_run_with_waiting_threads_that_give_way(given: dict[str, str], expected: str) -> None:
    clean = {key: value for key, value in os.environ.items() if key not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    done = subprocess.run([sys.executable, "-c", CHILD], env=clean | given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected
