"""What every channel scorer offers, and the sums that several share. Pure numpy. F channels an expert."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64

ROUNDING = 1e-9  # a variance below this share of the mean square is none


class ChannelScorer(Protocol):
    """`score` gives f64 `[L, E, F]`: higher is worth more, comparable inside an expert. That is all that a pack asks of
    it, which has one width for all experts. A new formula is a new `version`.

    `needs` names the extras (extras.py) that it reads beside what every profile has.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def needs(self) -> Needs: ...

    def score(self, statistics: Statistics) -> F64: ...


def per_token(statistics: Statistics, name: str) -> F64:
    """A sum over tokens divided by how many tokens the expert got, f64 `[L, E, F]`; 0 where it got none."""
    sums = statistics.total(name)  # [L, E, F]
    routed = np.broadcast_to(statistics.total("selected")[:, :, None], sums.shape)
    return np.divide(sums, routed, out=np.zeros_like(sums), where=routed > 0)


def widths(statistics: Statistics, name: str) -> int:
    """F, read off an extra that the statistics have."""
    return int(statistics.extras[name].shape[-1])
