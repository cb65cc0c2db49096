"""A model folder made of a config alone: every tensor in its place and of its size, and no byte written.

What `plan` needs before anybody downloads sixty gigabytes. The weights are holes in a sparse file: never load them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from store.checkpoint import SINGLE
from store.errors import InvalidInput, UnsupportedFamily

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write_blueprint(config: Path, folder: Path) -> Path:
    """Map the model that `config` (a published config.json) describes into the new `folder`, and return that.

    Weights count in the config's own dtype, bfloat16 where it names none. Raises InvalidInput for a file that is no
    config, UnsupportedFamily for an architecture that transformers does not know as a language model.
    """
    settings = _read(config)
    tensors = _tensors(settings)
    folder.mkdir(parents=True)
    shutil.copyfile(config, folder / "config.json")
    _write_holes(folder / SINGLE, tensors)
    return folder


def _read(config: Path) -> PretrainedConfig:
    try:
        fields: dict[str, Any] = json.loads(config.read_text())
        family = fields.pop("model_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInput(
            f"{config} is not a model's config.json with a model_type ({error}). Give the file that the model was "
            "published with.",
            param="config",
        ) from None
    try:
        return AutoConfig.for_model(family, **fields)
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
