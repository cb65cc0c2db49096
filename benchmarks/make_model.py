"""Random checkpoints in hub layout at real shapes: for speed alone, never for a claim on quality.

Written tensor by tensor into the map of a config, so that a model larger than memory can be made.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from engine.blueprint import write_blueprint
from engine.tiny import write_byte_tokenizer
from engine.tiny_config import TOKENS
from store.checkpoint import CheckpointMap
from store.errors import Conflict, InvalidInput
from store.shard import TensorSpan

PIECE = 1 << 24  # elements drawn at once
STD = 0.02
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

_OLMOE: Mapping[str, Any] = {
    "model_type": "olmoe",
    "dtype": "bfloat16",
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    **TOKENS,
}
_MINI = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 64, "vocab_size": 32000}
_FULL = {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "head_dim": 128, "vocab_size": 50304}

# Qwen3-Next's proportions: three layers of linear attention to one of attention, whose heads share keys and values.
_NEXT: Mapping[str, Any] = {
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    **TOKENS,
}

# name -> config
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "olmoe-mini": {**_OLMOE, **_MINI},
    "olmoe": {**_OLMOE, **_FULL},
    "qwen3-next-mini": _NEXT,
}


def make_model(shape: str, out: Path, seed: int = 0) -> int:
    """Write a random bf16 checkpoint of `shape` into the new folder `out`; gives its bytes on disk."""
    if shape not in SHAPES:
        raise InvalidInput(f"No shape {shape!r}; there are {', '.join(sorted(SHAPES))}.", param="shape")
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "config.json"
        config.write_text(json.dumps(SHAPES[shape], indent=2) + "\n")
        return make_from_config(config, out, seed)


def make_from_config(config: Path, out: Path, seed: int = 0) -> int:
    """The same at the shape of any published config.json. The tokenizer is one of bytes, whatever the vocabulary."""
    if out.exists() and any(out.iterdir()):
        raise Conflict(f"{out} is there and not empty. Name a new folder, or empty it.")
    if out.exists():
        out.rmdir()
    checkpoint = CheckpointMap.open(write_blueprint(config, out))
    generator = torch.Generator().manual_seed(seed)
    [file] = checkpoint.files
    with file.open("r+b") as written:
        for span in sorted(checkpoint.tensors.values(), key=lambda each: each.offset):
            written.seek(span.offset)
            _fill(written, span, generator)
    write_byte_tokenizer(out)
    return checkpoint.weight_bytes


def _fill(out: BinaryIO, span: TensorSpan, generator: torch.Generator) -> None:
    """Norms near one, everything else spread around zero, in the tensor's own dtype."""
    dtype = DTYPES[span.dtype]
    norm = len(span.shape) == 1 and span.name.endswith("norm.weight")
    left = span.nbytes // dtype.itemsize
    while left:
        count = min(left, PIECE)
        noise = torch.randn(count, generator=generator)
        piece = 1 + 0.1 * noise if norm else STD * noise
        out.write(piece.to(dtype).view(torch.uint8).numpy().data)
        left -= count
