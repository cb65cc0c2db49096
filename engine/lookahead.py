"""Which experts the next MoE layer will probably want: its router, run early on the present layer's router input.

A guess, for exact mode's read-ahead; it never routes anything. T tokens, H hidden, E experts, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.kernels import pad_rows
from engine.restriction import Route


class Lookahead:
    """`expect(layer, experts)` is told about every layer but the first, the most wanted experts first; `end` when a
    pass is over."""

    def __init__(
        self,
        routes: Sequence[Route],
        experts: int,
        expect: Callable[[int, Sequence[int]], None],
        end: Callable[[], None],
    ) -> None:
        self._routes, self._experts, self._expect, self.end = routes, experts, expect, end

    def look(self, layer: int, x: Tensor) -> None:
        """`x` [T, H] are the router inputs of MoE layer `layer`, of the tokens that are routed freely."""
        after = layer + 1
        if after == len(self._routes) or not len(x):
            return
        _, _, index = self._routes[after](pad_rows(x))
        index = index[: len(x)]  # [T, k]
        if len(index) == 1:
            self._expect(after, index[0].tolist())
            return
        counts = torch.bincount(index.flatten(), minlength=self._experts)  # [E]
        order = counts.argsort(descending=True, stable=True)  # [E]
        self._expect(after, order[: int((counts > 0).sum())].tolist())
