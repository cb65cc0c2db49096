"""Reasons not to trust a profile, read from its statistics: little text, routing like chance, halves that differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.scorers.frequency import Frequency
from profiler.stability import split_half_overlap
from profiler.statistics import Statistics
from store.records import F64

FEW_TOKENS = 30  # a routed token or two decide whether such an expert stays
LITTLE_SKEW = 2.0  # times what chance alone does
LITTLE_AGREEMENT = 0.6  # half of all experts agree on a half by chance


@dataclass(frozen=True, slots=True)
class Gates:
    """`tokens_per_expert` and `skew` are medians over experts and layers, `unseen` is a share of all experts."""

    tokens_per_expert: float
    unseen: float
    skew: float
    least_skew: float
    agreement: float | None

    def doubts(self) -> list[str]:
        found = []
        if self.tokens_per_expert < FEW_TOKENS:
            found.append(
                f"The median expert saw {self.tokens_per_expert:.0f} tokens, fewer than {FEW_TOKENS}: "
                "give more calibration text."
            )
        if self.skew < LITTLE_SKEW:
            found.append(
                f"Routing differs from chance only {self.skew:.1f} times as much as chance does: this text has no "
                "experts of its own, and any selection is about as good as a random one."
            )
        if self.agreement is not None and self.agreement < LITTLE_AGREEMENT:
            found.append(
                f"Two halves of the text share {self.agreement:.0%} of the experts that they use most, chance alone "
                "gives 50%: give more text of one kind."
            )
        return found


def gates(statistics: Statistics, tokens: int) -> Gates:
    """`tokens` is what the text had: a mean over tasks has forgotten it."""
    routed = statistics.total("selected") * (tokens / max(statistics.token_count, np.finfo(np.float64).tiny))
    found = skew(routed, tokens, statistics.top_k)
    return Gates(
        tokens_per_expert=float(np.median(routed)),
        unseen=float((routed == 0).mean()),
        skew=float(np.median(found)),
        least_skew=float(found.min()),
        agreement=split_half_overlap(statistics, Frequency(), 0.5),
    )


def skew(routed: F64, tokens: int, top_k: int) -> F64:
    """How unevenly each layer's experts are used, f64 `[L]`: 1 is what a uniform router does by chance.

    `sum_e (n_e - m)^2 / m`, m = T K / E, over its mean E - K when every token draws K of E experts at random. Tokens of
    real text are not drawn one by one, so this is a scale, not a test.
    """
    experts = routed.shape[1]
    mean = tokens * top_k / experts
    if experts == top_k or mean == 0:
        return np.ones(len(routed))
    spread: F64 = ((routed - mean) ** 2).sum(axis=1) / mean / (experts - top_k)
    return spread
