"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures named by SPATIAL_REAL_DATA; tests that need it are skipped where it is unset."""
    named = os.environ.get("SPATIAL_REAL_DATA")
    if not named:
        pytest.skip("SPATIAL_REAL_DATA is unset: it names the folder with buildings/0201.tar and 0202.tar")
    return Path(named).resolve()
