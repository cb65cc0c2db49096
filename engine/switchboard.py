"""All routers of a model, and each limited to a selection. Calls go through a pass's `Routing`. Knows no rows.

L MoE layers, E experts a layer, P strips of each (engine/strips.py; mostly 1), T tokens, k experts a token.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels import pad_rows
from engine.lookahead import Lookahead
from engine.masked_router import MaskedRouter
from engine.restriction import Limited, Restriction, Route, Routed, call_router, check_router, restrict
from engine.row_limits import Restrictions
from engine.stand_ins import DeviceStandIns, Replacement
from engine.strips import Strips
from engine.top_k import can_choose_fewer, choosing
from store.errors import InvalidInput, UnsupportedFamily
from store.records import Selection

if TYPE_CHECKING:
    from engine.routing import Routing


class Switchboard:
    """All routers of a model. Calls go through unchanged unless a `Routing` is plugged in for the pass."""

    def __init__(
        self, routers: Sequence[Any], strips: Strips, top_k: int, remembered: int, stand_ins: DeviceStandIns
    ) -> None:
        """`remembered` bounds how many selections keep their restrictions (sliced routers, where they need them)."""
        self.experts = strips.experts
        self.strips = strips
        self.top_k = top_k
        self.routing: Routing | None = None
        self.stand_ins = stand_ins
        self.added: dict[int, Tensor] = {}  # by layer, [T, H]: what the pass adds for experts that are left out
        self.lookahead: Lookahead | None = None  # where exact mode reads ahead
        self.masked: list[MaskedRouter] = []  # one a layer, or none at all
        self.fewer = False  # whether all routers can choose fewer than top_k experts a token
        self._routers = [_Router(layer, module, self) for layer, module in enumerate(routers)]
        self._remembered = remembered
        self._cache: OrderedDict[Selection, Restrictions] = OrderedDict()

    @property
    def layers(self) -> int:
        return len(self._routers)

    @property
    def routes(self) -> list[Route]:
        """The unrestricted routers' choices of strips, one a layer."""
        return [router.free for router in self._routers]

    def check(self, hidden: int) -> None:
        """Raises UnsupportedFamily unless every router can be limited to a set. Needs the weights."""
        for router in self._routers:
            check_router(router.module, router.inner, hidden)
        masked = [MaskedRouter.of(router.module, router.inner, hidden) for router in self._routers]
        self.masked = [router for router in masked if router is not None]
        if len(self.masked) < self.layers:
            self.masked = []
        self.fewer = all(can_choose_fewer(router.module, router.inner, hidden) for router in self._routers)

    def check_selection(self, selection: Selection) -> None:
        """Raises InvalidInput for a selection of another shape, of unknown experts, or too small for one token;
        UnsupportedFamily for one of fewer calls where the routers can't make fewer.
        """
        if len(selection.experts) != self.layers:
            raise InvalidInput(
                f"The selection has {len(selection.experts)} layers, the model has {self.layers} MoE layers. "
                "It was made for another model: profile this one.",
                param="selection",
            )
        for layer, ids in enumerate(selection.experts):
            if len(self.strips.experts_of(ids)) < self.top_k or (ids and ids[-1] >= self.strips.total):
                strips = "" if self.strips.count == 1 else f", in {self.strips.count} strips each"
                raise InvalidInput(
                    f"MoE layer {layer} of the selection has {len(ids)} experts, the highest is "
                    f"{ids[-1] if ids else None}; every "
                    f"layer needs at least {self.top_k} (a token's top-k{strips}) of the experts 0 to "
                    f"{self.strips.total - 1}.",
                    param="selection",
                )
        if selection.stand_in is not None and self.strips.count > 1:
            raise InvalidInput(
                f"The selection has stand-ins ({selection.stand_in.id}), and this model's experts lie in "
                f"{self.strips.count} strips, of which a token may find some: nothing stands in for a strip. Choose a "
                "selection without stand-ins, or the unsplit model.",
                param="selection",
            )
        if selection.calls is not None:
            self._check_calls(selection.calls)

    def _check_calls(self, calls: Sequence[int]) -> None:
        if max(calls) > self.top_k:
            raise InvalidInput(
                f"The selection routes a token to {max(calls)} experts in a layer; the model's top-k is {self.top_k}. "
                "It was made for another model: profile this one.",
                param="selection",
            )
        if not self.fewer:
            raise UnsupportedFamily(
                f"{type(self._routers[0].module).__name__} has no number of experts a token that could be lowered. "
                "Choose a selection that calls all of them (active 1)."
            )

    def restrictions(self, selection: Selection) -> Restrictions | None:
        """The routers limited to `selection`; None where it limits nothing."""
        calls = selection.calls or (self.top_k,) * self.layers
        if all(len(ids) == self.strips.total for ids in selection.experts) and min(calls) == self.top_k:
            return None
        if selection.stand_in is not None:
            return self._replacements(selection, calls, self.stand_ins.vectors(selection.stand_in))
        if selection not in self._cache:
            self._cache[selection] = tuple(map(self._restrict, range(self.layers), selection.experts, calls))
            while len(self._cache) > self._remembered:
                self._cache.popitem(last=False)
        self._cache.move_to_end(selection)
        return self._cache[selection]

    def within(self, layer: int, x: Tensor, logits: Tensor, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weights and index [T, k*P] when only `ids` are there; `logits` [T, E*P] as observers see them."""
        logits = logits[:, :: self.strips.count]  # [T, E]
        limit = self._held(ids, restrict(self._routers[layer].module, self.strips.experts_of(ids)))
        weights, index = self.strips.spread(*limit.route(x, logits))
        if limit.held is None:
            return weights, index
        return weights, index.masked_fill(~limit.held.flatten()[index], self.strips.total)

    def _restrict(self, layer: int, ids: Sequence[int], calls: int) -> Restriction:
        """One layer's router limited to `ids` and to `calls` experts a token; places left free are nobody's."""
        return self._held(ids, self._limit(layer, self.strips.experts_of(ids), calls))

    def _held(self, ids: Sequence[int], limit: Restriction) -> Restriction:
        """The limit with the strips `ids` of its experts, where experts have several."""
        if self.strips.count == 1:
            return limit
        held = torch.zeros(self.strips.total, dtype=torch.bool, device=limit.allowed.device)  # [E*P]
        held[list(ids)] = True
        held = held.view(self.experts, -1)
        return replace(limit, held=held, listed=self.strips.listed(held))

    def _limit(self, layer: int, experts: Sequence[int], calls: int) -> Restriction:
        module = self._routers[layer].module
        module = module if calls == self.top_k else choosing(module, calls)
        if not self.masked:
            limit = restrict(module, experts)
            return limit if calls == self.top_k else Restriction(limit.allowed, self._widened(limit.route))
        device = next(module.parameters()).device
        kept = torch.tensor(list(experts), device=device)  # [M]
        allowed = torch.zeros(self.experts, dtype=torch.bool, device=device).index_fill_(0, kept, True)  # [E]
        forbidden, router = ~allowed, self.masked[layer]
        router = router if calls == self.top_k else router.choosing(calls)
        return Restriction(allowed, self._widened(lambda _, logits: router(logits, forbidden)), forbidden.unsqueeze(0))

    def _widened(self, route: Limited) -> Limited:
        """What `route` chooses, [T, k], in top_k places."""

        def wide(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
            weights, index = route(x, logits)
            free = (0, self.top_k - index.shape[1])
            return (F.pad(weights, free), F.pad(index, free, value=self.experts)) if free[1] else (weights, index)

        return wide

    def _replacements(self, selection: Selection, calls: Sequence[int], vectors: Tensor) -> Restrictions:
        """`vectors` [L, E, H]: nothing is copied, so nothing needs to be remembered."""
        allowed = torch.zeros(vectors.shape[:2], dtype=torch.bool)  # [L, E]
        for layer, ids in enumerate(selection.experts):
            allowed[layer, list(ids)] = True
        rows = allowed.to(vectors.device).unbind(0)
        all_experts = range(self.experts)
        free = [None if k == self.top_k else self._limit(at, all_experts, k).route for at, k in enumerate(calls)]
        return tuple(Replacement(*layer) for layer in zip(rows, vectors.unbind(0), free, strict=True))


class _Router:
    """One layer's router module, its forward replaced on the instance."""

    def __init__(self, layer: int, module: Any, board: Switchboard) -> None:
        self.layer = layer
        self.module = module
        self.inner: Route = partial(call_router, module)
        self._board = board
        module.forward = self

    def __call__(self, hidden: Tensor, *_: Tensor, **__: Tensor) -> Routed:
        x = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
        logits, weights, index = self.inner(pad_rows(x))
        routed = logits[: len(x)], weights[: len(x)], index[: len(x)]
        routing = self._board.routing
        return self._board.strips.of_all(routed) if routing is None else routing.route(self.layer, x, routed)

    def free(self, x: Tensor) -> Routed:
        """The unrestricted choice of `x` [T, H]."""
        return self._board.strips.of_all(self.inner(x))
