"""The model taken apart layer by layer, as the profiler reads it: nothing here answers a request.

B rows, S positions, H hidden, E experts, n tokens, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine.channels import Channels
from engine.experts import PagedExperts
from engine.kernels import pad_rows
from engine.layerwise import Reached, decoder_layers, only, since
from engine.observer import Observer
from engine.restriction import call_router, groups_of
from engine.routing import Routing
from engine.skeleton import Skeleton
from engine.strips import one_share, repeated, share_of
from engine.top_k import choosing
from store.errors import UnsupportedFamily

if TYPE_CHECKING:
    from engine.engine import Engine

# Of decoder layers, the number of one and its input: where a pass begins, and perhaps ends.
Way = Callable[[Sequence[nn.Module], int, Tensor | None], AbstractContextManager[None]]


class Layers:
    """The engine's own, and its thread's. `layer` counts MoE layers but in `forward`, which counts decoder layers."""

    def __init__(self, engine: Engine, skeleton: Skeleton, experts: Sequence[PagedExperts]) -> None:
        self._engine = engine
        self._model, self._joints, self._experts = skeleton.model, skeleton.joints, experts

    @property
    def router_names(self) -> tuple[str, ...]:
        """What transformers calls the routers, a MoE layer each."""
        names = {module: name for name, module in self._model.named_modules()}
        return tuple(names[joint.router] for joint in self._joints)

    @property
    def decoder_numbers(self) -> tuple[int, ...]:
        """The decoder layers that hold the MoE layers, in order."""
        return tuple(decoder_layers(self._model, [joint.experts for joint in self._joints])[1])

    @property
    def grouped(self) -> bool:
        """Whether the router chooses groups of experts before it chooses experts."""
        return any(groups_of(joint.router) > 1 for joint in self._joints)

    def share_of_strips(self, strips: int) -> float:
        """What a router that has every row `strips` times gives each, of what ours gives the expert.

        Raises UnsupportedFamily where that is not the same for all.
        """
        card, routers = self._engine.card, [joint.router for joint in self._joints]
        shares = {share_of(repeated(each, strips, card.top_k), each, strips, card.hidden) for each in routers}
        return one_share(shares)

    @property
    def channels(self) -> Channels:
        """How the channels of an expert lie in its parameters."""
        return Channels.of(self._joints[0].experts, self._engine.bank.layout)

    @torch.inference_mode()
    def forward(
        self, layer: int, ids: Tensor, mask: Tensor, hidden: Tensor | None, observer: Observer | None = None
    ) -> Tensor:
        """Decoder layer `layer` alone, routed freely: `hidden` [B, S, H], what the layer before gave, -> [B, S, H].

        `ids` and `mask` i64 [B, S] as for `Engine.forward`; `hidden` is None for layer 0.
        """
        try:
            self._run(self._from(only, layer, hidden), ids, mask, observer)
        except Reached as end:
            return end.hidden
        raise AssertionError("the pass went past its layer")

    def to_the_end(
        self, layer: int, ids: Tensor, mask: Tensor, hidden: Tensor | None, observer: Observer | None = None
    ) -> Tensor:
        """As `forward`, with all that follows the layer up to what the engine's `head` takes: [B, S, H]."""
        return self._states(self._from(since, layer, hidden), ids, mask, observer)

    def whole(self, ids: Tensor, mask: Tensor, observer: Observer | None = None) -> Tensor:
        """All layers, of any model, as `to_the_end`: `ids`, `mask` i64 [B, S] -> [B, S, H]."""
        return self._states(nullcontext(), ids, mask, observer)

    @torch.inference_mode()
    def _states(
        self, part: AbstractContextManager[None], ids: Tensor, mask: Tensor, observer: Observer | None
    ) -> Tensor:
        with self._engine.head.listening() as heard:
            self._run(part, ids, mask, observer)
        [states] = heard
        return states

    def _from(self, way: Way, layer: int, hidden: Tensor | None) -> AbstractContextManager[None]:
        assert (hidden is None) == (layer == 0), layer
        decoders = decoder_layers(self._model, [joint.experts for joint in self._joints])[0]
        return way(decoders, layer, None if hidden is None else hidden.to(self._engine.device))

    def _run(self, part: AbstractContextManager[None], ids: Tensor, mask: Tensor, observer: Observer | None) -> None:
        """A pass in which every row is routed freely, of as many layers as `part` lets it have."""
        engine, device = self._engine, self._engine.device
        engine.admission.check_pass(ids, mask, [None] * len(ids))
        routing = Routing(engine.board, [None] * len(ids), device)
        with ExitStack() as stack:
            engine.admission.require_free_slot([None])
            if observer is not None:
                stack.enter_context(engine.passes.observed(observer, routing))
            stack.enter_context(part)
            engine.passes.whole(ids.to(device), mask.to(device), routing, keep=1)

    @torch.inference_mode()
    def expert_outputs(self, layer: int, x: Tensor) -> Tensor:
        """What each expert of MoE layer `layer` makes of the router inputs `x` [n, H], unweighted: [n, E, H]."""
        if not self._joints[layer].same_states:
            raise UnsupportedFamily(
                f"The experts of {self._engine.card.family} read other states than its router, so what they make of "
                "the router's inputs means nothing."
            )
        self._engine.admission.require_free_slot([None])
        return self._experts[layer].outputs(x.to(self._engine.device))

    @torch.inference_mode()
    def routed(self, layer: int, x: Tensor, calls: int) -> Tensor:
        """What the routed experts of MoE layer `layer` together make of `x` [n, H], which router and experts are given
        alike, by `calls` experts a token: [n, H]. Of `choosing`'s kind: see `Switchboard.fewer`.
        """
        self._engine.admission.require_free_slot([None])
        x = x.to(self._engine.device)
        few = call_router(choosing(self._joints[layer].router, calls), pad_rows(x))
        _, weights, index = self._engine.board.strips.of_all(few)
        return self._experts[layer](x, index[: len(x)], weights[: len(x)])

    @torch.inference_mode()
    def expert_weights(self, layer: int) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Every expert of MoE layer `layer` once, in any order, with its parameters in the layout's order: views of
        the bank, good until the next pair is asked for.
        """
        self._engine.admission.require_free_slot([None])
        yield from self._experts[layer].weights()

    @torch.inference_mode()
    def route_within(self, layer: int, x: Tensor, logits: Tensor, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weights and index [n, k] that the router of MoE layer `layer` gives `x` [n, H] when only `experts` are there.

        `logits` [n, E] are what the unrestricted router said.
        """
        return self._engine.board.within(layer, x, logits, experts)
