"""Random checkpoints in hub layout at real shapes: for speed alone, never for a claim on quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap
from store.errors import Conflict, InvalidInput

_OLMOE: Mapping[str, Any] = {
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
_MINI = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 32000}
_FULL = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 50304}

# name -> family, config fields
SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "olmoe-mini": ("olmoe", {**_OLMOE, **_MINI}),
    "olmoe": ("olmoe", {**_OLMOE, **_FULL}),
}


def make_model(shape: str, out: Path, seed: int = 0) -> int:
    """Write a random bf16 checkpoint of `shape` into the new folder `out`; gives its bytes on disk."""
    if shape not in SHAPES:
        raise InvalidInput(f"No shape {shape!r}; there are {', '.join(sorted(SHAPES))}.", param="shape")
    if out.exists() and any(out.iterdir()):
        raise Conflict(f"{out} is there and not empty. Name a new folder, or empty it.")
    family, fields = SHAPES[shape]
    write_tiny(family, out, seed, dtype="bfloat16", std=0.02, **fields)
    return CheckpointMap.open(out).weight_bytes
