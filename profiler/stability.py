"""Would other text of the same task choose the same experts? One half of the items against the other."""

from __future__ import annotations

from profiler.allocation import uniform
from profiler.scorers.base import Scorer
from profiler.statistics import Statistics


def split_half_overlap(statistics: Statistics, scorer: Scorer, keep: float) -> float | None:
    """The share of experts that both halves keep, between 0 and 1; None where a half has no tokens."""
    halves = [statistics.half(0), statistics.half(1)]
    if any(half.token_count == 0 for half in halves):
        return None
    one, other = (set(uniform(scorer.score(half), keep, statistics.top_k)) for half in halves)
    return len(one & other) / len(one)
