"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real pictures named by SPATIAL_REAL_DATA; in CI its absence is a failure, elsewhere a skip."""
    named = os.environ.get("SPATIAL_REAL_DATA")
    if not named:
        message = "SPATIAL_REAL_DATA is unset: it names the folder with buildings/0201.tar and 0202.tar"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return Path(named).resolve()
