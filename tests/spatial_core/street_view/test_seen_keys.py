"""The compact set against Python's own."""

from __future__ import annotations

import numpy as np
import pytest

from spatial_core.street_view import seen_keys
from spatial_core.street_view.seen_keys import SeenKeys


@pytest.mark.parametrize("recent", [1, 7, 64, 10_000])
def test_it_knows_what_a_set_knows(recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seen_keys, "_RECENT", recent)
    keys, reference = SeenKeys(), set[int]()
    for key in np.random.default_rng(3).integers(0, 700, 3000).tolist():
        assert keys.add(key) == (key not in reference)
        reference.add(key)
        assert len(keys) == len(reference)


def test_both_ends_of_the_range() -> None:
    keys = SeenKeys()
    for key in (0, 2**64 - 1):
        assert keys.add(key)
        keys._compact()
        assert not keys.add(key)
