"""End to end on the bundled model: real weights, real files, real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from store.home import bundled_model


@pytest.fixture(scope="session")
def model() -> Path:
    return bundled_model()


@pytest.fixture(scope="session")
def demo_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The database that the demo's offline job fills: URL of one that `demo_run` has been through."""
    return f"sqlite:///{tmp_path_factory.mktemp('demo') / 'store.db'}"


@pytest.fixture(scope="session")
def demo_run(demo_store: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `moepager demo` says, run as a new user runs it, once for all tests."""
    environment = os.environ | {"MOEPAGER_HOME": str(tmp_path_factory.mktemp("home"))}
    command = [sys.executable, "-m", "service", "demo", "--store", demo_store, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
