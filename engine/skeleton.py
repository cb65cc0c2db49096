"""The transformers model without its experts, built on the meta device, and the joints where moepager meets it.

Knows how transformers builds models and names weights; knows no bytes, no slots, no routing policy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.conversion_mapping import get_model_conversion_mapping

from engine import experts as dispatch
from engine.layout import Renaming, SlotLayout, derive_layout
from engine.restriction import ADOPTED, BATCHED
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap

Block = tuple[Any, Any, Any]  # the module of one MoE block, its router, its experts


@dataclass(frozen=True, slots=True)
class Joint:
    """Where one MoE layer meets moepager: its router, its experts, and the norm whose input is the residual stream."""

    router: Any
    experts: Any
    norm: nn.Module | None


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model whose experts hold no weights. `kv_shapes` are heads and width of keys and values, a decoder layer."""

    model: Any
    layout: SlotLayout
    joints: tuple[Joint, ...]
    kv_shapes: tuple[tuple[tuple[int, int], tuple[int, int]], ...]


def build_skeleton(checkpoint: CheckpointMap, experts: ExpertMap, dtype: str) -> tuple[Skeleton, Renaming]:
    """The model on the meta device. Raises UnsupportedFamily naming what does not meet the contract."""
    dispatch.register()
    model = _on_meta(Path(checkpoint.folder), getattr(torch, dtype))
    renaming = Renaming(model, get_model_conversion_mapping(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    layout, owners = derive_layout(renaming, checkpoint, experts, shapes, getattr(torch, dtype))
    blocks = [_block(model, owner, experts.experts) for owner in owners]
    order, cache = _trial(model, [_decoder(owner)[0] for owner in owners], blocks)
    joints = tuple(
        Joint(router, module, _norm_before(model, owner, order))
        for (_, router, module), owner in zip(blocks, owners, strict=True)
    )
    for joint in joints:
        dispatch.drop_parameters(joint.experts)
    return Skeleton(model, layout, joints, _kv_shapes(cache)), renaming


def _on_meta(folder: Path, dtype: torch.dtype) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, experts_implementation=dispatch.IMPLEMENTATION, trust_remote_code=False
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedFamily(f"transformers can't build the model of {folder}: {error}") from error
    model.config.use_cache = False
    return model


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
    return block, scoring[0], module


def _decoder(owner: str) -> tuple[str, str]:
    """The decoder layer of an experts module, and the name of that layer's child on the way to it."""
    words = owner.split(".")
    at = max(place for place, word in enumerate(words) if word.isdecimal())
    return ".".join(words[: at + 1]), words[at + 1]


def _trial(model: Any, decoders: Sequence[str], blocks: Sequence[Block]) -> tuple[dict[str, list[str]], Any]:
    """Send one token through on the meta device: the order of calls in each decoder layer, and the cache's shapes."""
    order: dict[str, list[str]] = {name: [] for name in decoders}
    handles = []
    for block, router, _ in blocks:
        handles.append(router.register_forward_pre_hook(_adopt_arguments(block), with_kwargs=True))
        handles.append(router.register_forward_hook(_check_router_contract))
    for name in decoders:
        for child, module in model.get_submodule(name).named_children():
            handles.append(module.register_forward_pre_hook(lambda *_, n=name, c=child: order[n].append(c)))
    cache = DynamicCache()
    try:
        with torch.inference_mode():
            ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, LookupError, ValueError) as error:
        raise UnsupportedFamily(f"{type(model).__name__} can't be run on shapes alone: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return order, cache


def _adopt_arguments(block: Any) -> Any:
    """A hook that makes what a router is called with besides the hidden states, such as its block's correction bias,
    tensors of the router itself: they are limited to a set as its own are."""
    own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())}

    def hook(router: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if not args or any(id(extra) not in own for extra in (*args[1:], *named.values())):
            raise UnsupportedFamily(
                f"{type(router).__name__} routes by more than the hidden states and its block's own weights, so it "
                "can't be limited to a set."
            )
        for place, extra in enumerate((*args[1:], *named.values())):
            keep = router.register_parameter if isinstance(extra, nn.Parameter) else router.register_buffer
            keep(f"{ADOPTED}{place}", extra)
        setattr(router, BATCHED, args[0].dim() == 3)

    return hook


def _check_router_contract(router: Any, _: tuple[Any, ...], routed: Any) -> None:
    name, experts = type(router).__name__, router.num_experts
    if not (isinstance(routed, tuple) and len(routed) == 3 and all(isinstance(part, Tensor) for part in routed)):
        raise UnsupportedFamily(f"{name} does not return (logits, weights, index), so routing can't be restricted.")
    logits, weights, index = routed
    if logits.shape[-1] != experts or weights.shape != index.shape or index.dim() != 2:
        raise UnsupportedFamily(
            f"{name} returns shapes {[list(part.shape) for part in routed]}; wanted [T, {experts}], [T, k], [T, k]."
        )


def _norm_before(model: Any, owner: str, order: Mapping[str, Sequence[str]]) -> nn.Module | None:
    """The child that the decoder layer called last before its MoE block; its input is the residual stream."""
    decoder, block = _decoder(owner)
    called = order[decoder]
    at = called.index(block) if block in called else 0
    if at == 0 or "norm" not in type(model.get_submodule(f"{decoder}.{called[at - 1]}")).__name__.lower():
        return None
    norm: nn.Module = model.get_submodule(f"{decoder}.{called[at - 1]}")
    return norm


def _kv_shapes(cache: Any) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    def shape(tensor: Tensor) -> tuple[int, int]:
        return tensor.shape[1], tensor.shape[3]

    return tuple((shape(layer.keys), shape(layer.values)) for layer in cache.layers)
