"""A quick start for short jobs."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec


class _NoPandas:
    """Finds no pandas."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name == "pandas":
            raise ModuleNotFoundError(name)
        return None


def keep_pandas_out() -> None:
    """Have pyarrow do without pandas in this process.

    When it is first given a list, pyarrow imports pandas to ask whether the list is one of its series: 0.3 core
    seconds, nearly half of a short job. No stage hands it one. It asks only once, so it is made to ask now, while there
    is none; whoever imports pandas afterwards gets it.
    """
    if "pandas" in sys.modules:
        return
    sys.meta_path.insert(0, _NoPandas)
    try:
        import pyarrow as pa

        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)
