"""Fixtures of training tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.make_training_lake import Lake, build_lake


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    """Splits and a difficulty table of a few buildings."""
    return build_lake(tmp_path)


@pytest.fixture
def make_lake(tmp_path: Path) -> Callable[..., Lake]:
    """The same in other sizes."""

    def make(**sizes: int) -> Lake:
        return build_lake(tmp_path, **sizes)

    return make
