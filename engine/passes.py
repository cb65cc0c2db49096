"""Passes through the model: its own forward, with what routing has to know before it and what must follow it.

B rows, S positions, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.experts import PagedExperts
from engine.kvcache import KvCache
from engine.layerwise import Reached, decoder_layers, only, since
from engine.observer import Observer
from engine.routing import Routing
from engine.skeleton import Skeleton
from engine.step import Step
from store.errors import UnsupportedFamily


class Passes:
    """One after the other: the routing of a pass is the switchboard's while it runs."""

    def __init__(self, skeleton: Skeleton, experts: Sequence[PagedExperts], step: Step | None = None) -> None:
        self._step = step  # where the model's own forward adds nothing
        self._model, self._joints, self._experts = skeleton.model, skeleton.joints, experts
        self.decoders = _decoders(skeleton)  # none where the model can't be run layer by layer
        self.goes_on = True  # whether several tokens of a prompt may follow others in a pass of their own

    def whole(self, ids: Tensor, mask: Tensor, routing: Routing, keep: int = 0) -> Tensor:
        """`ids`, `mask` i64 [B, S] -> logits f32 [B, S, V], nothing remembered; of the last `keep` columns alone, if
        any."""
        positions = _positions(mask)  # [B, S]
        with _routed(routing, mask):
            out = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep
            )
        logits: Tensor = out.logits
        return logits.float()

    @torch.inference_mode()
    def step(self, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        """Continue `cache` by `ids` [B, new] under `mask` [B, everything so far]. Logits of the last column, [B, V]."""
        return self._continue(ids, mask, cache, routing, self._step)

    def _continue(self, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing, step: Step | None) -> Tensor:
        """By `step` where it takes the pass."""
        new = ids.shape[1]
        positions = _positions(mask)[:, -new:]  # [B, new]
        with _routed(routing, mask[:, -new:]), cache.passing(mask[:, -new:]):
            if step is not None and step.takes(ids, mask, cache):
                return step(ids, positions, mask, cache)
            return self._theirs(ids, positions, mask, cache)

    def _theirs(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: KvCache) -> Tensor:
        out: Any = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits
        return logits[:, -1]

    def _from_layer(self, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        """As `step`, always through the model's own forward: engine.layerwise has changed where it begins or ends."""
        return self._continue(ids, mask, cache, routing, None)

    @torch.inference_mode()
    def layer(
        self, layer: int, hidden: Tensor | None, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing
    ) -> Tensor:
        """Of `step` decoder layer `layer` alone: `hidden` [B, new, H], what the layer before gave, -> [B, new, H].

        Only that layer of `cache` grows, all of which must end where `ids` begins. For rows that are routed freely:
        nothing is metered.
        """
        with only(self.decoders, layer, hidden):
            try:
                self._from_layer(ids, mask, cache, routing)
            except Reached as end:
                return end.hidden
        raise AssertionError("the pass went past its layer")

    @torch.inference_mode()
    def last(self, hidden: Tensor | None, ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        """As `layer` for the last one, and all that follows it: logits of the last column, [B, V]."""
        with since(self.decoders, len(self.decoders) - 1, hidden):
            return self._from_layer(ids, mask, cache, routing)

    @contextmanager
    def observed(self, observer: Observer, routing: Routing) -> Iterator[None]:
        """Everything of one pass is shown to `observer`."""
        routing.observer = observer
        handles = []
        for layer, (joint, paged) in enumerate(zip(self._joints, self._experts, strict=True)):
            handles.append(joint.residual.register_forward_pre_hook(_residual_hook(observer, layer), with_kwargs=True))
            paged.observer = observer
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for paged in self._experts:
                paged.observer = None


def _positions(mask: Tensor) -> Tensor:
    """`mask` i64 [B, S] -> i64 [B, S], padding at 0."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def _decoders(skeleton: Skeleton) -> Sequence[nn.Module]:
    """The decoder layers, if each keeps a cache of its own and they hand on nothing but hidden states."""
    if not skeleton.plain_layers:
        return ()
    try:
        layers = decoder_layers(skeleton.model, [joint.experts for joint in skeleton.joints])[0]
    except UnsupportedFamily:
        return ()
    caches = [shape for shape in skeleton.caches if shape.remembers]
    return layers if len(layers) == len(caches) else ()


@contextmanager
def _routed(routing: Routing, mask: Tensor) -> Iterator[None]:
    """A pass over the columns of `mask` i64 [B, new]; one that fails leaves no trace in the routing."""
    routing.begin(mask.shape[1], mask.bool())
    try:
        yield
    except BaseException:
        routing.abort()
        raise
    routing.finish()


def _residual_hook(observer: Observer, layer: int) -> Any:
    def hook(_: object, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        states = (*args, *named.values())[0]  # [B, S, H] or [T, H]
        observer.residual(layer, states.reshape(-1, states.shape[-1]))

    return hook
