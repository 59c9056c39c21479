"""Halves come back whole and in order, from memory and from the overflow file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spatial_core.errors import ArtifactError
from spatial_core.street_view.waiting_halves import WaitingHalves


@pytest.mark.parametrize("limit", [0, 3, 50, 10_000])
def test_it_keeps_what_a_dict_keeps(tmp_path: Path, limit: int) -> None:
    rng = np.random.default_rng(5)
    reference: dict[bytes, tuple[int, bytes]] = {}
    with WaitingHalves(tmp_path / "overflow", limit) as waiting:
        for offset in range(600):
            key = bytes([int(rng.integers(0, 200))]) * 17
            if key in reference:
                assert waiting.pop(key) == reference.pop(key)[1]
            else:
                assert waiting.pop(key) is None
                packed = rng.bytes(int(rng.integers(0, 90)))
                waiting.add(key, offset, packed)
                reference[key] = (offset, packed)
        assert (tmp_path / "overflow").exists() == (limit < 100)
        assert list(waiting.remaining()) == [packed for _, packed in sorted(reference.values())]
    assert not (tmp_path / "overflow").exists()


def test_what_a_killed_run_left_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "overflow").write_bytes(b"half a database")
    with WaitingHalves(tmp_path / "overflow", 0) as waiting:
        waiting.add(b"k", 1, b"packed")
        assert waiting.pop(b"k") == b"packed"


def test_an_overflow_that_cannot_be_written(tmp_path: Path) -> None:
    with WaitingHalves(tmp_path / "missing" / "overflow", 0) as waiting, pytest.raises(ArtifactError, match="overflow"):
        waiting.add(b"k", 1, b"packed")
