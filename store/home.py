"""Where things lie by default: the data folder, the embedded store, and the bundled demo model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import platformdirs


def data_path() -> Path:
    """Where the data folder is, or would be."""
    return Path(os.environ.get("MOEPAGER_HOME") or platformdirs.user_data_dir("moepager"))


def data_folder() -> Path:
    """`MOEPAGER_HOME`, or the user's data folder; made if it is missing, for its owner alone: it holds users' texts."""
    folder = data_path()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def default_store_url() -> str:
    return store_url(data_folder())


def store_url(folder: Path) -> str:
    """Of the embedded store in a data folder."""
    return f"sqlite:///{folder / 'store.db'}"


def bundled_model() -> Path:
    """The folder of the demo model. It is found, not imported: the rooms below do not know the demo."""
    spec = importlib.util.find_spec("demo")
    assert spec is not None, "the demo package is part of the distribution"
    assert spec.origin is not None, "the demo package has an __init__.py"
    return Path(spec.origin).parent / "model"
