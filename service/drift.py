"""Whether a task's traffic is still what its profile was made of, by the share of router weight outside the selection.

The rule is TAME's (arXiv 2210.03869): a smoothed miss above the mean plus three standard deviations of the raw misses
before. Unlike there, the newest requests join the baseline with a delay, or a shift would widen its own bound. It finds
abrupt shifts; slow ones move the baseline along. Knows no store: who is told is the caller's choice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

WINDOW = 100  # requests that make the baseline; raw misses: smoothed ones would hide their spread
WARM_UP = 20  # requests before anything is judged
DELAY = 10  # requests that are judged, and no baseline yet
NEWEST = 0.2  # weight of the newest miss in the smoothed one
SIGMAS = 3.0
LEAST_SPREAD = 0.005  # a share: a task whose misses are all alike must not alarm at a hair's breadth


@dataclass(frozen=True, slots=True)
class Alarm:
    task: str
    profile: str
    level: float  # the smoothed miss
    bound: float
    requests: int  # that made the bound


@dataclass(slots=True)
class _Traffic:
    """Of one profile."""

    raw: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    recent: deque[float] = field(default_factory=deque)
    level: float | None = None
    bound: float | None = None  # of the alarm that rings; the baseline stands still until it ends

    def take(self, miss: float) -> bool:
        """Whether an alarm begins with this request."""
        self.level = miss if self.level is None else NEWEST * miss + (1 - NEWEST) * self.level
        if self.bound is not None:
            if self.level > self.bound:
                return False
            self.bound = None
        if len(self.raw) >= WARM_UP:
            bound = float(np.mean(self.raw)) + SIGMAS * max(float(np.std(self.raw)), LEAST_SPREAD)
            if self.level > bound:
                self.bound = bound
                self.recent.clear()
                return True
        self.recent.append(miss)
        if len(self.recent) > DELAY:
            self.raw.append(self.recent.popleft())
        return False


class DriftWatch:
    """The traffic of every profile in service. Belongs to one thread; `told` is called with each alarm that begins."""

    def __init__(self, told: Callable[[Alarm], None]) -> None:
        self._told = told
        self._traffic: dict[str, tuple[str, _Traffic]] = {}  # task -> its profile, and that one's requests

    def observe(self, task: str, profile: str, coverage: float) -> None:
        """One request of a task was served from its profile, with this share of router weight inside the selection."""
        known, traffic = self._traffic.get(task, ("", _Traffic()))
        if known != profile:  # profiled anew: another selection, another baseline
            traffic = _Traffic()
            self._traffic[task] = profile, traffic
        if traffic.take(1.0 - coverage):
            assert traffic.level is not None, "it was just set"
            assert traffic.bound is not None, "an alarm has a bound"
            self._told(Alarm(task, profile, traffic.level, traffic.bound, len(traffic.raw)))

    def drifting(self, task: str) -> bool:
        """Whether an alarm of this task rings now."""
        return task in self._traffic and self._traffic[task][1].bound is not None
