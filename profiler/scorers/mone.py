"""mone, mone_mean: how much an expert's output varies, so how badly its mean replaces it (MoNE, arXiv 2507.00390)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64

ROUNDING = 1e-6  # norms were f32: a variance below this share of the mean square is none


class Mone:
    """`MONE_e = sqrt(tr Cov(o_te : e in S_t)) * phi_e`, 0 for an expert with fewer than two tokens.

    `phi_e` is `sum_t w_te` (`mone`, as the released code does: frequency counts) or its mean over routed tokens
    (`mone_mean`, as the paper writes). The covariance comes from exact sums, `(R2 - |S1|^2 / n) / (n - 1)`, not from
    the code's recursion, which leaves out the first batch. A mean over tasks is no count: there n stands for n - 1.
    The method keeps a dropped expert's mean output as its stand-in, which here is `--stand-in novice`;
    without it the score is judged without the half that it was made for.
    """

    version = "1"
    needs: Needs = frozenset({"output_sums"})

    def __init__(self, gates: Literal["sum", "mean"]) -> None:
        self.name = "mone" if gates == "sum" else "mone_mean"
        self._gates = gates

    def score(self, statistics: Statistics) -> F64:
        spread, gates = np.sqrt(output_variance(statistics)), statistics.total("gates")
        if self._gates == "sum":
            return spread * gates
        routed = statistics.total("selected")
        return spread * np.divide(gates, routed, out=np.zeros_like(routed), where=routed > 0)


def output_variance(statistics: Statistics) -> F64:
    """The trace of the covariance of each expert's output over its tokens, f64 `[L, E]`."""
    routed, squares = statistics.total("selected"), statistics.total("squared_norms")
    sums = statistics.total("output_sums")  # [L, E, H]
    some = routed > 0
    centred = squares - np.divide((sums**2).sum(axis=-1), routed, out=np.zeros_like(routed), where=some)
    centred = np.where(centred > ROUNDING * squares, centred, 0.0)
    counts = routed - 1 if statistics.token_count > 1 else routed
    return np.divide(centred, counts, out=np.zeros_like(routed), where=some & (counts > 0))
