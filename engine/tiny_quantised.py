"""A checkpoint's matrices rewritten in one of the ways of quantising: for tests and speed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.rounding import as_stored, rounded
from store.quantisation import BLOCK, FP8, MXFP4, PUBLISHED, with_experts_in

Wanted = Callable[[str], bool]


def write_quantised(way: str, folder: Path, wanted: Wanted | None = None) -> Path:
    """Quantise the experts of `folder` in place and return it: gpt-oss's in MXFP4 as it is published. `wanted` chooses
    tensors by name instead."""
    config = json.loads((folder / "config.json").read_text())
    published = config["model_type"] == PUBLISHED
    _rewrite(way, folder, wanted or _is_expert, BLOCK, turned=published and way != FP8, published=published)
    (folder / "config.json").write_text(json.dumps(with_experts_in(way, config), indent=2))
    return folder


def write_mxfp4(folder: Path, wanted: Wanted | None = None) -> Path:
    return write_quantised(MXFP4, folder, wanted)


def write_fp8(folder: Path, block: tuple[int, int] = BLOCK, wanted: Wanted | None = None) -> Path:
    """In DeepSeek-V3's layout, all matrices but routers, embeddings and the head; `wanted` chooses by name instead."""
    _rewrite(FP8, folder, wanted or _is_linear, block)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def _rewrite(
    way: str, folder: Path, chosen: Wanted, block: tuple[int, int], *, turned: bool = False, published: bool = False
) -> None:  # fmt: skip
    for file in sorted(folder.glob("*.safetensors")):
        held: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if not chosen(name) or tensor.dim() < 2 or name.endswith("_bias"):
                held[name] = tensor
            else:
                made = rounded(way, tensor.mT if turned else tensor, block)
                held |= as_stored(way, name, *made, published=published)
        save_file(held, file, metadata={"format": "pt"})


def _is_expert(name: str) -> bool:
    return "experts" in name.split(".") or "_linear" in name  # Granite's


def _is_linear(name: str) -> bool:
    words = name.split(".")
    return words[-1] == "weight" and not {"gate", "router", "embed_tokens", "lm_head", "norm"} & set(words)
