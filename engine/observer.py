"""What one forward pass shows to those who watch it. Declares the hooks; the profiler accumulates behind them.

T tokens of the pass, row-major over [B, S]; H hidden; E experts; k experts a token; n choices: pairs of a
token and an expert that it was routed to.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class Observer(Protocol):
    """Called once per MoE layer and pass, in the order residual, routed, experts, combined.

    Tensors are the model's own: read them, never write. Padding is in `h`, `x`, `logits`, `weights`, `index` and `y`,
    with `valid` False, but no expert ever sees it.
    """

    def residual(self, layer: int, h: Tensor) -> None:
        """`h` [T, H]: the residual stream before the norm of the feed-forward."""
        ...

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        """`x` [T, H] router input, `logits` [T, E] of the unrestricted router, `weights` and `index` [T, k] as applied.

        `valid` bool [T] is False for padding.
        """
        ...

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """All of the layer's choices in any order: `experts` i64 [n] of E, `tokens` i64 [n] of T, `weights` [n],
        `outputs` [n, H] before they are weighted, good until the call ends.
        """
        ...

    def combined(self, layer: int, y: Tensor) -> None:
        """`y` [T, H]: the weighted sum of the routed experts, shared experts excluded."""
        ...


@runtime_checkable
class ChannelObserver(Observer, Protocol):
    """One that looks inside experts too: `channels` comes once per expert that was hit, before `experts`."""

    def channels(self, layer: int, expert: int, tokens: Tensor, weights: Tensor, inputs: Tensor, h: Tensor) -> None:
        """Of one expert: `inputs` [n, 2F], gate and up as the module lays them out ([n, F] without a gate); `h` [n, F],
        what the down projection takes.
        """
        ...
