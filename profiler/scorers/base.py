"""What every scorer offers, and the sums that several of them share. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64, Selection


class Scorer(Protocol):
    """`score` gives f64 `[L, E]`: higher is worth more, comparable within a layer. A new formula is a new `version`.

    `needs` names the extras (extras.py) that the formula reads beside what every profile has; `score` raises
    InvalidInput for statistics that lack one.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def score(self, statistics: Statistics) -> F64: ...


@runtime_checkable
class Picker(Protocol):
    """A scorer whose best sets are no ranking: it names the set for each layer's number of experts itself."""

    def pick(self, statistics: Statistics, counts: Sequence[int]) -> Selection: ...


def per_token(statistics: Statistics, name: str) -> F64:
    """A sum divided by the number of tokens, f64 `[L, E]`."""
    return statistics.total(name) / max(statistics.token_count, np.finfo(np.float64).tiny)


def per_routed(statistics: Statistics, name: str) -> F64:
    """A sum divided by how many tokens the expert got, f64 `[L, E]`; 0 for an expert that got none."""
    routed = statistics.total("selected")
    return np.divide(statistics.total(name), routed, out=np.zeros_like(routed), where=routed > 0)


def break_ties(scores: F64, fallback: F64) -> F64:
    """Scores in the same order, equal ones ordered by `fallback` >= 0: nudged by less than half the smallest gap."""
    nudged = scores.copy()
    for layer, row in enumerate(scores):
        gaps = np.diff(np.unique(row))
        room = min(float(gaps.min()) / 2 if gaps.size else np.inf, 1e-6 * max(float(np.abs(row).max()), 1.0))
        top = float(fallback[layer].max())
        nudged[layer] += room * fallback[layer] / top if top > 0 else 0.0
    return nudged
