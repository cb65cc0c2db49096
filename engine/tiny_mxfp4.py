"""A checkpoint's experts rewritten in MXFP4, as gpt-oss or compressed-tensors store them: for tests and speed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.mxfp4 import as_stored, quantise
from store.quantisation import PUBLISHED, in_mxfp4


def write_mxfp4(folder: Path, wanted: Callable[[str], bool] | None = None) -> Path:
    """Quantise the experts of `folder` in place and return it: gpt-oss's as it is published, any other's as
    compressed-tensors has them. `wanted` chooses tensors by name instead."""
    chosen = wanted or _is_expert
    config = json.loads((folder / "config.json").read_text())
    published = config["model_type"] == PUBLISHED
    for file in sorted(folder.glob("*.safetensors")):
        held: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not chosen(name) or tensor.dim() < 2 or name.endswith("_bias"):
                held[name] = tensor
            else:
                held |= as_stored(name, *quantise(tensor.mT if published else tensor), published=published)
        save_file(held, file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(in_mxfp4(config), indent=2))
    return folder


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".") or "_linear" in name  # Granite's
