"""A checkpoint's matrices rewritten as FP8 with a scale a block, in DeepSeek-V3's layout: for tests and speed runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from store.block_scales import BLOCK, scale_name

LARGEST = 448.0  # of float8_e4m3fn


def write_fp8(folder: Path, block: tuple[int, int] = BLOCK, wanted: Callable[[str], bool] | None = None) -> Path:
    """Quantise the matrices of `folder` in place, routers, embeddings and the head excepted, and return it.

    `wanted` chooses by name instead.
    """
    chosen = wanted or _is_quantised
    for file in sorted(folder.glob("*.safetensors")):
        held: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            held[name] = tensor
            if tensor.dim() == 2 and chosen(name):
                held[name], held[scale_name(name)] = quantise(tensor, block)
        save_file(held, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def quantise(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] -> FP8 [N, K] and f32 scales [ceil(N / n), ceil(K / k)], so that a block's largest is 448."""
    rows, columns = (-(-length // size) for length, size in zip(weight.shape, block, strict=True))
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[part].float()  # [n, k]
            scales[i, j] = values.abs().max().clamp(min=1e-12) / LARGEST
            stored[part] = (values / scales[i, j]).to(torch.float8_e4m3fn)
    return stored, scales


def _is_quantised(name: str) -> bool:
    words = name.split(".")
    return words[-1] == "weight" and not {"gate", "router", "embed_tokens", "lm_head"} & set(words)
