"""Which folder a `--model` means: a folder, a hub id (with a network, or cached), or the bundled model."""

from __future__ import annotations

import os
import re
from pathlib import Path

from store.errors import CheckpointError
from store.home import bundled_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
WANTED = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]  # never a pickle, never code


def model_folder(model: str | Path | None) -> Path:
    """The folder to serve. None means the bundled demo model."""
    if model is None:
        return bundled_model()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if isinstance(model, str) and HUB_ID.fullmatch(model):
        return _from_hub(model)
    raise CheckpointError(
        f"No model folder at {folder}. Give a folder with config.json and safetensors files, "
        "or a hub id such as owner/name."
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow to import, and most models are folders
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, allow_patterns=WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise CheckpointError(
                f"{name} is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it. "
                "Set HF_HUB_OFFLINE=0 for the first start, or give a folder."
            ) from error
        raise CheckpointError(
            f"{name} is neither a folder here nor a model that the hub gives: {str(error).splitlines()[0]} "
            "Check the spelling and the network, or give a folder."
        ) from error
