"""One token through the model on the meta device: what calls what with which tensors, before any weight is read.

Tensors have shapes and identities there, and no values. T tokens, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from engine.cache_shape import CacheShape
from engine.quiet import no_advice
from engine.restriction import ADOPTED, BATCHED
from store.errors import UnsupportedFamily


@dataclass(frozen=True, slots=True)
class Block:
    """One MoE block: the decoder layer, its child that holds the experts (or is them), the router, the experts."""

    decoder: Any
    child: Any
    module: Any
    router: Any
    experts: Any


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Of each block, the module whose first argument is the residual stream before it, and whether router and experts
    read the same states; of each decoder layer, what it caches; whether those of the blocks hand on hidden states and
    nothing else."""

    residuals: tuple[nn.Module, ...]
    same_states: tuple[bool, ...]
    caches: tuple[CacheShape, ...]
    plain_layers: bool


def run_trial(model: Any, blocks: Sequence[Block]) -> Witnessed:
    """Raises UnsupportedFamily for a model that can't be run so, or a router that breaks the contract."""
    watches = [_Watch(block) for block in blocks]
    try:
        caches = try_caches(model)
    finally:
        for watch in watches:
            watch.end()
    return Witnessed(
        residuals=tuple(watch.residual for watch in watches),
        same_states=tuple(watch.same_states for watch in watches),
        caches=caches,
        plain_layers=all(watch.plain_layer for watch in watches),
    )


def try_caches(model: Any) -> tuple[CacheShape, ...]:
    """What each decoder layer of `model`, which is on the meta device, caches. Raises UnsupportedFamily."""
    try:
        with torch.inference_mode(), no_advice():
            cache = DynamicCache(config=model.config)
            ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        caches = tuple(map(CacheShape.of, cache.layers))
    except (RuntimeError, TypeError, NotImplementedError, AttributeError, LookupError, ValueError) as error:
        raise UnsupportedFamily(f"{type(model).__name__} can't be run on shapes alone: {error}") from error
    if all(shape.kv is None for shape in caches):
        raise UnsupportedFamily(
            f"{type(model).__name__} keeps no keys and values in any layer, which a batch counts by."
        )
    return caches


class _Watch:
    """Hooks on one block for one pass."""

    def __init__(self, block: Block) -> None:
        self.residual: nn.Module = block.child  # until a norm before it is seen to feed it
        self.same_states = self.plain_layer = True
        self._router = block.router
        self._normed: list[tuple[nn.Module, Tensor, Tensor]] = []  # a norm, its input, its output
        self._routed: Tensor | None = None
        self._own = {id(tensor) for tensor in (*block.module.parameters(), *block.module.buffers())}
        self._handles = [
            block.child.register_forward_pre_hook(self._before_block, with_kwargs=True),
            block.router.register_forward_pre_hook(self._before_router, with_kwargs=True),
            block.router.register_forward_hook(_check_router_contract),
            block.experts.register_forward_pre_hook(self._before_experts, with_kwargs=True),
            block.decoder.register_forward_hook(self._after_decoder),
        ]
        norms = [child for child in block.decoder.children() if "norm" in type(child).__name__.lower()]
        self._handles += [norm.register_forward_hook(self._after_norm) for norm in norms]

    def end(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _after_decoder(self, _: object, __: tuple[Any, ...], output: object) -> None:
        self.plain_layer = isinstance(output, Tensor)

    def _after_norm(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._normed.append((norm, args[0], output))

    def _before_block(self, _: object, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        states = (*args, *named.values())[0]
        for norm, given, output in self._normed:
            if _same(output, states):  # a router that has run by now, as gemma 4's, has seen the stream before the norm
                self.residual = self._router if self._routed is not None and _same(given, self._routed) else norm

    def _before_router(self, router: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """What a router is called with besides the hidden states, such as its block's correction bias, becomes tensors
        of the router itself: they are limited to a set as its own are."""
        states, *extras = (*args, *named.values())
        if any(id(extra) not in self._own for extra in extras):
            raise UnsupportedFamily(
                f"{type(router).__name__} routes by more than the hidden states and its block's own weights, so it "
                "can't be limited to a set."
            )
        for place, extra in enumerate(extras):
            keep: Callable[..., None] = (
                router.register_parameter if isinstance(extra, nn.Parameter) else router.register_buffer
            )
            keep(f"{ADOPTED}{place}", extra)
        setattr(router, BATCHED, states.dim() == 3)
        self._routed = states

    def _before_experts(self, _: object, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        self.same_states = self._routed is not None and _same(self._routed, (*args, *named.values())[0])


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether both are views of one memory."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _check_router_contract(router: Any, _: tuple[Any, ...], routed: Any) -> None:
    name, experts = type(router).__name__, router.num_experts
    if not (isinstance(routed, tuple) and len(routed) == 3 and all(isinstance(part, Tensor) for part in routed)):
        raise UnsupportedFamily(f"{name} does not return (logits, weights, index), so routing can't be restricted.")
    logits, weights, index = routed
    if logits.shape[-1] != experts or weights.shape != index.shape or index.dim() != 2:
        raise UnsupportedFamily(
            f"{name} returns shapes {[list(part.shape) for part in routed]}; wanted [T, {experts}], [T, k], [T, k]."
        )
