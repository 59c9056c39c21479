"""Short jobs start quickly."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import os
import sys
assert "numpy" not in sys.modules
from spatial_core.jobs.light_start import start_light
if "{before}" == "pandas":
    import pandas
start_light()
import pyarrow as pa
table = pa.table({{"a": ["x", None], "b": [[1], []]}})
assert pa.array([1.5, None]).null_count == 1
print("pandas" in sys.modules)
print("numpy" in sys.modules, os.environ["OPENBLAS_THREAD_TIMEOUT"])
import pandas
print(pandas.DataFrame({{"a": [1, 2]}}).a.sum())
"""


def run(before: str) -> list[str]:
    program = PROGRAM.format(before=before)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_pyarrow_does_without_pandas_and_others_still_get_it() -> None:
    assert run("nothing") == ["False", "True", "4", "3"]


def test_where_pandas_is_there_already_nothing_changes() -> None:
    assert run("pandas") == ["True", "True", "4", "3"]
