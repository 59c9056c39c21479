"""A set of 64-bit keys in about 8 bytes a key, for names and ids of tars with millions of members."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import numpy.typing as npt

_RECENT = 1 << 16


class SeenKeys:
    """Keys from 0 to 2^64 - 1; a Python set of the same integers takes eight to ten times the memory.

    New keys go to a small set; when it is full it becomes a sorted run. Runs of similar length are merged, so there are
    never more than some log2(keys / 65 536) of them to look into.
    """

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._runs: list[npt.NDArray[np.uint64]] = []
        self._views: list[memoryview] = []

    def __len__(self) -> int:
        return len(self._recent) + sum(map(len, self._runs))

    def add(self, key: int) -> bool:
        """Take in `key`; False if it was there before."""
        if key in self._recent:
            return False
        for run in self._views:
            at = bisect_left(run, key)
            if at < len(run) and run[at] == key:
                return False
        self._recent.add(key)
        if len(self._recent) >= _RECENT:
            self._compact()
        return True

    def _compact(self) -> None:
        run = np.sort(np.fromiter(self._recent, np.uint64, len(self._recent)))
        self._recent = set()
        while self._runs and len(self._runs[-1]) <= len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)
        # Looked up through memoryviews: their items are plain integers, numpy's cost ten times as much to compare.
        self._views = [run.data for run in self._runs]
