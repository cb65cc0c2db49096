"""Slots whose experts no request uses now, and in which order they are given up. Knows slots and uses, no experts."""

from __future__ import annotations

from collections import OrderedDict
from heapq import heappop, heappush, heapreplace
from math import inf, log2

HALF_LIFE = 32  # turns after which a lease counts half
FADED = -2.0  # log2 of the worth, in fresh leases, below which a leased expert has lost its privilege


class Idle:
    """First goes what leases used long ago, then what visits paged through, the least recently used first, then what
    leases use: the lowest worth first, which is the leases that it served, each halved every HALF_LIFE turns, times
    the cost of reading it again.

    A turn is a request. Worths are kept as logarithms that grow with the turn of a use: waiting does not change them.
    """

    def __init__(self, slots: int) -> None:
        self._turn = 0
        self._passing: OrderedDict[int, None] = OrderedDict()  # no lease used them; the least recently used first
        self._kept: set[int] = set()  # leases used them
        self._worth = [-inf] * slots  # of what a lease used, idle or not
        self._cost = [0.0] * slots
        self._queue: list[tuple[float, int]] = []  # (worth, slot), one each at most; worths may have risen since
        self._queued: set[int] = set()

    def __len__(self) -> int:
        return len(self._passing) + len(self._kept)

    def __contains__(self, slot: int) -> bool:
        return slot in self._passing or slot in self._kept

    def begin_turn(self) -> None:
        """A request begins."""
        self._turn += 1

    def lease(self, slot: int, cost: float) -> None:
        """A lease uses the slot's expert. `cost` is log2 of what reading it takes, over that of the dearest expert."""
        self._cost[slot] = cost
        now, worth = self._now(slot), self._worth[slot]
        high, low = max(now, worth), min(now, worth)
        self._worth[slot] = high + log2(1 + 2 ** (low - high))

    def add(self, slot: int) -> None:
        """Nobody uses its expert any more: it was used just now."""
        if self._worth[slot] == -inf:
            self._passing[slot] = None
            return
        self._kept.add(slot)
        self.touch(slot)
        if slot not in self._queued:
            self._queued.add(slot)
            heappush(self._queue, (self._worth[slot], slot))

    def discard(self, slot: int) -> None:
        """Somebody uses its expert, if it was idle."""
        self._passing.pop(slot, None)
        self._kept.discard(slot)

    def touch(self, slot: int) -> None:
        """A visit used the slot's expert: if it is idle, it is given up later than the others of its kind, or as late
        as one that a lease has just used for the first time."""
        if slot in self._passing:
            self._passing.move_to_end(slot)
        elif slot in self._kept:
            self._worth[slot] = max(self._worth[slot], self._now(slot))

    def pop(self) -> int:
        """The slot that is given up first. There must be one."""
        least = self._least()
        if self._passing and least >= self._turn / HALF_LIFE + FADED:
            slot, _ = self._passing.popitem(last=False)
            return slot
        _, slot = heappop(self._queue)
        self._queued.discard(slot)
        self._kept.discard(slot)
        return slot

    def forget(self, slot: int) -> None:
        """Another expert will come into the slot."""
        self._worth[slot] = -inf

    def check(self) -> None:
        """Assert that classes, worths and queue tell the same story."""
        assert self._kept.isdisjoint(self._passing)
        assert all(self._worth[slot] > -inf for slot in self._kept)
        assert all(self._worth[slot] == -inf for slot in self._passing)
        assert self._kept <= self._queued
        assert sorted(slot for _, slot in self._queue) == sorted(self._queued)
        assert all(worth <= self._worth[slot] for worth, slot in self._queue)

    def _least(self) -> float:
        """The lowest worth of the kept, whose slot is then the queue's first; infinite if there are none."""
        while self._queue:
            worth, slot = self._queue[0]
            if slot not in self._kept:  # in use: it is queued again when it is idle again
                heappop(self._queue)
                self._queued.discard(slot)
            elif worth < self._worth[slot]:
                heapreplace(self._queue, (self._worth[slot], slot))
            else:
                return worth
        return inf

    def _now(self, slot: int) -> float:
        """The worth of one use at this turn."""
        return self._turn / HALF_LIFE + self._cost[slot]
