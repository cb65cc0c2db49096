"""Adds up what happens inside experts, channel by channel, in the same pass as everything else.

n tokens of one expert, F channels. Collects just those statistics that it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.channels import Channels
from engine.engine import Engine
from profiler.accumulator import Accumulator
from profiler.extras import Needs

SUMS = frozenset({"channel_sums", "channel_squares", "channel_gated", "channel_inputs"})
PEAKS = "channel_peaks"


def make_accumulator(engine: Engine, needs: Needs) -> Accumulator:
    """One that looks inside experts only where a statistic needs it: that costs a look at every inner number."""
    card, device = engine.card, str(engine.device)
    if not needs & (SUMS | {PEAKS}):
        return Accumulator(card.layers, card.experts, card.top_k, device, needs=needs, hidden=card.hidden)
    return ChannelAccumulator(
        card.layers, card.experts, card.top_k, device, needs=needs, hidden=card.hidden, channels=engine.layers.channels
    )


class ChannelAccumulator(Accumulator):
    """An `engine.observer.ChannelObserver`."""

    def __init__(
        self, layers: int, experts: int, top_k: int, device: str = "cpu", *,
        needs: Needs, hidden: int, channels: Channels,
    ) -> None:  # fmt: skip
        super().__init__(layers, experts, top_k, device, needs=needs, hidden=hidden, inner=channels.width)
        self._channels = channels

    def channels(self, layer: int, expert: int, tokens: Tensor, weights: Tensor, inputs: Tensor, h: Tensor) -> None:
        assert self._pass is not None, "the routing comes before the experts"
        real = self._pass.valid[tokens]  # [n]
        if not bool(real.all()):
            tokens, weights, inputs, h = tokens[real], weights[real], inputs[real], h[real]
        halves = torch.nn.functional.one_hot(self._halves[tokens], 2).T.to(torch.float64)  # [2, n]
        h, weights = h.to(torch.float64), weights.to(torch.float64)  # [n, F], [n]
        squares = h.square()  # [n, F]
        here = (slice(None), layer, expert)
        if "channel_sums" in self._extras:
            self._extras["channel_sums"][here] += halves @ h  # [2, F]
        if "channel_squares" in self._extras:
            self._extras["channel_squares"][here] += halves @ squares
        if "channel_gated" in self._extras:
            self._extras["channel_gated"][here] += (halves * weights.square()) @ squares
        if "channel_inputs" in self._extras:
            moved = inputs.to(torch.float64).square()  # [n, 2F]
            for part, values in enumerate(self._channels.parts((halves @ moved).T)):  # [F, 2] each
                self._extras["channel_inputs"][:, part, layer, expert] += values.T
        if PEAKS in self._extras and len(tokens):
            peaks = (weights[:, None] * h).abs().amax(dim=0)  # [F]
            table = self._extras[PEAKS]
            table[layer, expert] = torch.maximum(table[layer, expert], peaks)
