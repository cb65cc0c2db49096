"""End to end on the bundled model: real weights, real files, real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from store.home import bundled_model


@pytest.fixture(scope="session")
def model() -> Path:
    return bundled_model()
