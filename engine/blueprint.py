"""A model folder made of a config alone: every tensor in its place and of its size, and no byte written.

What `plan` needs before anybody downloads sixty gigabytes. The weights are holes in a sparse file: never load them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from engine.mxfp4 import require_groups
from engine.rounding import as_stored
from store.checkpoint import SINGLE
from store.errors import InvalidInput, UnsupportedFamily
from store.expert_names import find_routers, place
from store.quantisation import FP8, INT4, PUBLISHED, Coding, coding_of, with_experts_in
from store.quantised import scales_shape
from store.shard import TensorSpan

DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.uint8: "U8", torch.int32: "I32",
    torch.int64: "I64", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def write_blueprint(config: Path, folder: Path, *, way: str | None = None) -> Path:
    """Map the model that `config` (a published config.json) describes into the new `folder`, and return that.

    Weights count in the config's own dtype, bfloat16 where it names none, experts as the config quantises them, or in
    `way` where it does not, as `moepager quantise` would write them. Raises InvalidInput for a file that is no config,
    UnsupportedFamily for an architecture that transformers does not know as a language model.
    """
    fields = _fields(config)
    if way is not None and coding_of(fields) is None:
        fields = with_experts_in(way, fields)
    tensors = _tensors(_read(fields))
    if (coding := coding_of(fields)) is not None:
        tensors = _quantised(coding, tensors, published=fields["model_type"] == PUBLISHED)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    _write_holes(folder / SINGLE, tensors)
    return folder


def _fields(config: Path) -> dict[str, Any]:
    try:
        fields: dict[str, Any] = json.loads(config.read_text())
        fields["model_type"] + ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{config} is not a model's config.json with a model_type ({error}). Give the file that the model was "
            "published with.",
            param="config",
        ) from None
    return fields


def _read(fields: dict[str, Any]) -> PretrainedConfig:
    family = fields["model_type"]
    try:
        return AutoConfig.for_model(family, **{name: value for name, value in fields.items() if name != "model_type"})
    except ValueError as error:
        raise UnsupportedFamily(f"transformers knows no model_type {family!r}: {error}") from None


def _tensors(config: PretrainedConfig) -> dict[str, Tensor]:
    """Hub name -> a tensor on the meta device, which has a shape and no memory."""
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedFamily(f"transformers has no language model for {config.model_type!r}: {error}") from None
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    reverted: dict[str, Tensor] = revert_weight_conversion(model, held)
    return reverted


def _quantised(coding: Coding, tensors: dict[str, Tensor], *, published: bool) -> dict[str, Tensor]:
    """The matrices of experts as two tensors each. Raises InvalidInput for rows that are no whole groups."""
    spans = {name: TensorSpan(name, Path(), 0, 0, "", tuple(tensor.shape)) for name, tensor in tensors.items()}
    routers = find_routers(spans.values())
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if place(spans[name], routers) is None or tensor.dim() < 2 or name.endswith("bias"):
            found[name] = tensor
            continue
        shape = (*tensor.shape[:-2], *tensor.shape[-2:][::-1]) if published and coding.way != FP8 else tensor.shape
        made = as_stored(coding.way, name, *_shapes(coding, shape), published=published)
        found |= {each: held.to("meta") for each, held in made.items()}
    return found


def _shapes(coding: Coding, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Numbers and scales of a matrix [..., N, K], without memory."""
    *before, rows, columns = shape
    if coding.way != FP8:
        require_groups(columns)
    numbers, width, kind = {
        FP8: (torch.float8_e4m3fn, columns, torch.float32),
        INT4: (torch.int32, columns // 8, torch.bfloat16),
    }.get(coding.way, (torch.uint8, columns // 2, torch.uint8))
    return (
        torch.empty(*before, rows, width, dtype=numbers, device="meta"),
        torch.empty(scales_shape(coding, shape), dtype=kind, device="meta"),
    )


def _write_holes(file: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file: a true header, then nothing but its length."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
