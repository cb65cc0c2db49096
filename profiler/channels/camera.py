"""camera: how much a channel writes into the stream, on the whole and at its peak (CAMERA, arXiv 2508.02322)."""

from __future__ import annotations

from profiler.extras import Needs
from profiler.statistics import Statistics
from store.records import F64

PEAK_SHARE = 0.9  # of the released command; the paper's code defaults to 1, the peak alone


class Camera:
    """`s_c = |Wd_c|^2 * ((1 - a) * sum_t (w_t h_tc)^2 + a * max_t (w_t h_tc)^2)`, a = 0.9: frequency counts.

    One pass over the whole model; the source scores a layer after the layers below it were pruned.
    """

    name = "camera"
    version = "1"
    needs: Needs = frozenset({"channel_gated", "channel_peaks", "down_norms"})

    def __init__(self, peak_share: float = PEAK_SHARE) -> None:
        self._share = peak_share

    def score(self, statistics: Statistics) -> F64:
        mass, peak = statistics.total("channel_gated"), statistics.total("channel_peaks") ** 2
        return statistics.total("down_norms") ** 2 * ((1 - self._share) * mass + self._share * peak)
