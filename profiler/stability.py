"""Would other text of the same task choose the same experts? One half of the items against the other."""

from __future__ import annotations

from profiler.allocation import uniform
from profiler.extras import EXTRAS
from profiler.scorers.base import Scorer
from profiler.scorers.random import Random
from profiler.statistics import Statistics


def split_half_overlap(statistics: Statistics, scorer: Scorer, keep: float) -> float | None:
    """The share of experts that both halves keep, between 0 and 1.

    None where there is nothing to compare: a half has no tokens, the scorer looks at no text, or it reads something
    that was not kept apart by halves and would be said to agree with itself.
    """
    if scorer.name == Random.name or not all(EXTRAS[name].halved for name in scorer.needs):
        return None
    halves = [statistics.half(0), statistics.half(1)]
    if any(half.token_count == 0 for half in halves):
        return None
    one, other = (set(uniform(scorer.score(half), keep, statistics.top_k)) for half in halves)
    return len(one & other) / len(one)
