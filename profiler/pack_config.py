"""config.json of a packed model: which of its numbers must change, found by building the model on shapes alone.

Families call the width of their experts by different names, and some make other parts as wide. So candidates are tried
until the experts, and nothing else, have the wanted shapes. E experts, F channels.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.card import STRIPS, TOP_K
from engine.channels import Channels
from store.errors import UnsupportedFamily
from store.experts import COUNTS

SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts")

Shapes = dict[str, tuple[int, ...]]


def changed_config(
    folder: Path, channels: Channels, experts: int, kept: int, width: int, strips: int = 1
) -> dict[str, Any]:
    """The folder's config.json for `kept` experts, where it has `experts`, of `width` channels. Each is one of `strips`
    of an old one: a token goes through as many times as many. Raises UnsupportedFamily where no such config gives these
    shapes.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    base = _shapes(folder, {})
    wanted = _wanted(base, channels, (experts, kept), width)
    more = _more_a_token(_scope(config), strips) if strips > 1 else {}
    for change in _candidates(config, channels.width, (experts, kept), width):
        if _shapes(folder, change | more) == wanted:
            return _changed(config, change | more)
    raise UnsupportedFamily(
        f"No change of {folder / 'config.json'} gives {kept} experts of {width} channels and leaves the rest of the "
        "model as it is, so plain transformers could not load the pack. Try a width that divides the old one "
        f"({channels.width}), or keep all channels."
    )


def _more_a_token(scope: Mapping[str, Any], strips: int) -> dict[str, int]:
    """`strips` times the experts a token, under the name that is read, and for us the number itself."""
    name = next(name for name in TOP_K if type(scope.get(name)) is int)
    return {name: scope[name] * strips, STRIPS: strips * scope.get(STRIPS, 1)}


def _candidates(
    config: Mapping[str, Any], before: int, counts: tuple[int, int], width: int
) -> Iterator[dict[str, int]]:
    experts, kept = counts
    scope = _scope(config)
    fixed = {name: kept for name in COUNTS if scope.get(name) == experts}
    if width == before:
        yield fixed
        return
    named = [name for name, value in scope.items() if type(value) is int and value == before and "size" in name]
    for name in sorted(named, key=lambda name: ("moe" not in name, "shared" in name, name)):
        yield fixed | {name: width}
        for shared in SHARED_COUNTS:
            count = scope.get(shared)
            if type(count) is int and count * before % width == 0:  # as wide in all as they were
                yield fixed | {name: width, shared: count * before // width}


def _scope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def _changed(config: Mapping[str, Any], change: Mapping[str, int]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    scope = changed["text_config"] if isinstance(changed.get("text_config"), dict) else changed
    scope.update(change)
    return changed


def _shapes(folder: Path, change: Mapping[str, int]) -> Shapes:
    """The parameters' shapes; none where the family refuses such a config."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    inner = config.get_text_config()
    for name, value in change.items():
        setattr(inner, name, value)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, RuntimeError, AttributeError):
        return {}
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} | {
        f"{name} (buffer)": tuple(buffer.shape) for name, buffer in model.named_buffers() if "bias" in name
    }


def _wanted(base: Shapes, channels: Channels, counts: tuple[int, int], width: int) -> Shapes:
    experts, kept = counts
    owners = {name.rsplit(".", 1)[0] for name in base if name.endswith(".down_proj")}
    blocks = {owner.rsplit(".", 1)[0] for owner in owners}
    found: Shapes = {}
    for name, shape in base.items():
        owner = name.split(" ")[0].rsplit(".", 1)[0]
        if owner in owners:
            found[name] = (kept, *_narrowed(name.rsplit(".", 1)[1], shape[1:], channels, width))
        elif is_of_router(name, blocks) and shape[:1] == (experts,):
            found[name] = (kept, *shape[1:])
        else:
            found[name] = shape
    return found


def is_of_router(name: str, blocks: set[str]) -> bool:
    """Whether a tensor lies in a MoE block, and is no shared expert's."""
    return "shared" not in name and any(name.startswith(f"{block}.") for block in blocks)


def _narrowed(name: str, shape: tuple[int, ...], channels: Channels, width: int) -> tuple[int, ...]:
    dim = channel_dim(name, channels)
    if dim is None:
        return shape
    return (*shape[:dim], shape[dim] // channels.width * width, *shape[dim + 1 :])


def channel_dim(name: str, channels: Channels) -> int | None:
    """Along which dimension of one expert's parameter its channels lie; None for the bias behind them."""
    if name.endswith("_bias"):
        return None if name.startswith("down") else 0
    return int(channels.transposed != name.startswith("down"))
