"""PreMoe's own key of a query (arXiv 2505.17639, released code): which experts the first MoE layer's router wants.

Per expert the sum of raw top-1 logits over the prompt's tokens, divided by the number of all tokens: 0 for an expert
that is never first. Stops the pass at that router, before any expert is read. T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.engine import Engine
from engine.observer import Observer
from store.errors import InvalidInput
from store.records import F32


class _Seen(Exception):  # noqa: N818 - a way out, not an error
    """The first router has spoken; the rest of the pass is not needed."""


class _FirstRouter(Observer):
    """Takes layer 0's logits and ends the pass."""

    def __init__(self) -> None:
        self.signature = torch.zeros(0)  # [E]

    def routed(
        self,
        layer: int,
        x: Tensor,  # noqa: ARG002
        logits: Tensor,
        weights: Tensor,  # noqa: ARG002
        index: Tensor,  # noqa: ARG002
        valid: Tensor,
    ) -> None:
        assert layer == 0, layer
        highest, first = logits[valid].to(torch.float64).max(dim=-1)  # [T], [T]
        sums = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device).index_add(0, first, highest)
        self.signature = sums / len(first)  # [E]
        raise _Seen

    def residual(self, layer: int, h: Tensor) -> None:
        """Not needed."""

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """Never reached."""

    def combined(self, layer: int, y: Tensor) -> None:
        """Never reached."""


def signature(engine: Engine, prompt: Sequence[int]) -> F32:
    """f32 [E] of one prompt's tokens. Call it from the thread that owns the engine."""
    if not prompt:
        raise InvalidInput("A signature needs at least one token, the prompt has none.", param="prompt")
    watching = _FirstRouter()
    ids = torch.tensor([list(prompt)], dtype=torch.long)  # [1, T]
    try:
        engine.forward(ids, torch.ones_like(ids), [None], watching)
    except _Seen:
        return watching.signature.cpu().numpy().astype(np.float32)
    raise AssertionError("a model without MoE layers is refused when it is opened")
