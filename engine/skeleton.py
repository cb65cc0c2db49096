"""The transformers model without its experts, built on the meta device, and the joints where moepager meets it.

Knows how transformers builds models and names weights; knows no bytes, no slots, no routing policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from engine import dispatch
from engine.cache_shape import CacheShape
from engine.layout import Renaming, SlotLayout, derive_layout
from engine.trial import Block, run_trial
from engine.tried import on_meta
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap


@dataclass(frozen=True, slots=True)
class Joint:
    """Where one MoE layer meets moepager: its router, its experts, and the module whose input is the residual stream.

    `same_states`: the experts read what the router reads (gemma 4's do not).
    """

    router: Any
    experts: Any
    residual: nn.Module
    same_states: bool


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model whose experts hold no weights. `caches` is what each decoder layer keeps of a row, `plain_layers` says
    whether they hand on nothing but hidden states."""

    model: Any
    layout: SlotLayout
    joints: tuple[Joint, ...]
    caches: tuple[CacheShape, ...]
    plain_layers: bool


def build_skeleton(
    checkpoint: CheckpointMap, experts: ExpertMap, dtype: str, quantised: bool = True
) -> tuple[Skeleton, Renaming]:  # fmt: skip
    """The model on the meta device; `quantised`, its slots hold quantised experts as they are stored.

    Raises UnsupportedFamily naming what does not meet the contract.
    """
    model = on_meta(Path(checkpoint.folder), getattr(torch, dtype))
    renaming = Renaming(model, get_model_conversion_mapping(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layout, owners = derive_layout(renaming, checkpoint, experts, shapes, getattr(torch, dtype), quantised=quantised)
    blocks = [_block(model, owner, experts.experts) for owner in owners]
    seen = run_trial(model, blocks)
    joints = tuple(
        Joint(block.router, block.experts, residual, same)
        for block, residual, same in zip(blocks, seen.residuals, seen.same_states, strict=True)
    )
    for joint in joints:
        dispatch.drop_parameters(joint.experts)
    return Skeleton(model, layout, joints, seen.caches, seen.plain_layers), renaming


def _block(model: Any, owner: str, experts: int) -> Block:
    """One MoE block: its router is the child with a row for each expert."""
    block = model.get_submodule(owner.rsplit(".", 1)[0])
    module = model.get_submodule(owner)
    routers = [
        child
        for child in block.children()
        if child is not module and any(p.dim() == 2 and p.shape[0] == experts for p in child.parameters(recurse=True))
    ]
    scoring = [child for child in routers if getattr(child, "num_experts", None) == experts] or routers
    if len(scoring) != 1:
        raise UnsupportedFamily(
            f"{type(block).__name__} has {len(scoring)} modules that score {experts} experts; exactly one router that "
            "returns (logits, weights, index) is needed."
        )
    scoring[0].num_experts = experts  # gemma 4's router knows it only by its config
    decoder, child = (model.get_submodule(name) for name in _decoder(owner))
    return Block(decoder, child, block, scoring[0], module)


def _decoder(owner: str) -> tuple[str, str]:
    """The decoder layer of an experts module, and that layer's child on the way to it."""
    words = owner.split(".")
    at = max(place for place, word in enumerate(words) if word.isdecimal())
    return ".".join(words[: at + 1]), ".".join(words[: at + 2])
