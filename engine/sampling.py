"""From logits to the next token of each row. Every row draws from its own generator, so a batch never changes its text.

B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.requests import Sampling


class Sampler:
    """One row's sampling, seeded once."""

    def __init__(self, sampling: Sampling) -> None:
        self.greedy = sampling.temperature == 0
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def draw(self, logits: Tensor) -> int:
        """`logits` f32 [V] -> a token.

        One random number a token, turned into a token by the cumulative distribution.
        """
        scaled = logits.double() / self._temperature  # [V]
        probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)  # [V], [V]
        cumulative = probabilities.cumsum(-1)  # [V]
        kept = int((cumulative - probabilities < self._top_p).sum())  # the smallest set that holds top_p
        point = torch.rand((), dtype=torch.float64, generator=self._generator).to(logits.device) * cumulative[kept - 1]
        place = int(torch.searchsorted(cumulative[:kept], point, right=True).clamp(max=kept - 1))
        return int(order[place])


def next_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """`logits` [B, V] -> a token a row."""
    best: list[int] = logits.argmax(-1).tolist()
    return [
        token if sampler.greedy else sampler.draw(logits[row].float())
        for row, (token, sampler) in enumerate(zip(best, samplers, strict=True))
    ]
