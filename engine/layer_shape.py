"""One decoder layer as products.c takes it, and the memory that its two calls share. Holds addresses, decides nothing.

B rows, H hidden, E experts, k experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.addresses import DTYPES
from engine.block_shape import BlockShape, norm_eps
from engine.choice import Choice
from engine.shared_expert import SharedExpert


@dataclass(frozen=True, slots=True)
class LayerShape:
    """`fields` are those of `struct layer` beside its block: addresses of weights among them, which `kept` holds.
    `summed`: its feed-forward is nothing but experts and the `shared` one. Without that it is somebody else's; without
    a `choice` the router is.
    """

    block: BlockShape
    fields: tuple[int | float, ...]
    choice: Choice | None
    kept: tuple[Tensor, ...]
    summed: bool = False
    shared: SharedExpert | None = None

    @property
    def weights(self) -> int:
        """Of its attention or of its shared expert, whichever has more."""
        return max(self.block.weights, 0 if self.shared is None else self.shared.weights)

    @property
    def even(self) -> bool:
        """Whether what is multiplied with a token comes in pairs of numbers: engine.wide takes no others."""
        inner = [] if self.shared is None else [self.shared.fields[-1]]
        return not any(count % 2 for count in (self.block.hidden, self.block.head, *inner))

    @classmethod
    def of(
        cls, block: BlockShape, before: Any, after: Any, router: Tensor | None = None, choice: Choice | None = None
    ) -> LayerShape:
        """Of the norms before and after attention, `norms.computes_the_usual`, and the router's weights [E, H]."""
        held = [before.weight, after.weight]
        norms = [value for norm in (before, after) for value in (norm.weight.data_ptr(), norm_eps(norm) or 0.0)]
        if router is None or choice is None:
            return cls(block, (*norms, 0, 0, 0, 0, 0, 1.0), None, tuple(held))
        chosen = (choice.experts, choice.top_k, int(choice.renormalised), DTYPES[choice.dtype], choice.scale)
        return cls(block, (*norms, router.data_ptr(), *chosen), choice, (*held, router))


@dataclass(frozen=True, slots=True)
class Room:
    """What the first call leaves for the second: the residual stream after attention and the same normed, [B, 1, H]
    each, and the chosen weights [B, k]. Overwritten by the next token.
    """

    middle: Tensor
    normed: Tensor
    weights: Tensor
    addresses: tuple[int, int, int]

    @classmethod
    def of(cls, shape: LayerShape, rows: int) -> Room:
        middle, normed = (torch.zeros(rows, 1, shape.block.hidden, dtype=shape.block.dtype) for _ in range(2))
        choice = shape.choice
        weights = torch.zeros(rows, 0) if choice is None else torch.zeros(rows, choice.top_k, dtype=choice.dtype)
        return cls(middle, normed, weights, (middle.data_ptr(), normed.data_ptr(), weights.data_ptr()))

    def weighing(self, weights: Tensor) -> Room:
        """The same states with weights that the first call did not choose: [B, k], of strips [B, k*P]."""
        weights = (weights if weights.dtype in DTYPES else weights.float()).contiguous()
        return replace(self, weights=weights, addresses=(*self.addresses[:2], weights.data_ptr()))


@dataclass(frozen=True, slots=True)
class Limits:
    """What routing says of one layer and pass. `forbidden` bool [1 or B, E]: the experts that a row may not have, None:
    it may have all. `free_weights` and `free_index` [B, k] are filled with the choice among all; None: nobody asks.
    `calls` i64 [B]: how many experts a row is routed to, None: k.
    """

    forbidden: Tensor | None
    free_weights: Tensor | None
    free_index: Tensor | None
    calls: Tensor | None = None

    @property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """The stride of a row of `forbidden`, in bytes, is the second."""
        tensors = self.forbidden, self.free_weights, self.free_index, self.calls
        forbidden, weights, index, calls = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        row = 0 if self.forbidden is None or len(self.forbidden) == 1 else self.forbidden.stride(0)
        return forbidden, row, weights, index, calls


FREE = Limits(None, None, None)
