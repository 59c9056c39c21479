"""A quick start for short jobs."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec


class _NoPandas:
    """Finds no pandas."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError(name)
        return None


def start_light() -> None:
    """Have numpy and pyarrow start without work that no stage needs; to be called before either is imported.

    Together it is half of the processor time of a job that does little:

    * OpenBLAS starts a thread a core, and each looks for work without a pause for a tenth of a second. Told to, they go
      to sleep sooner; products of matrices are as fast.
    * When it is first given a list, pyarrow imports pandas to ask whether the list is one of its series. It asks once,
      so it is made to ask now, while there is none. Whoever imports pandas afterwards gets it.
    """
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        import pyarrow as pa

        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)
