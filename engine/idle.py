"""Experts that are resident though no request uses them now, and in which order they are given up. Knows no slots."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heappop, heappush, heapreplace
from math import inf, log2

from store.records import ExpertKey

HALF_LIFE = 32  # turns after which a use counts half
SPARED = 0.75  # of all slots: more is never spared


@dataclass(slots=True)
class _Uses:
    """Of one expert. `worth` is log2 of the uses, each halved every HALF_LIFE turns, times the cost of a read."""

    worth: float = -inf
    turn: int = -1  # of the last use
    stamp: int = 0  # grows with every use of any expert


class Idle:
    """First goes what is worth least: the requests that used it, by a lease or by visits, each counting half every
    HALF_LIFE turns, times what reading it again costs; of equals, the least recently used.

    What visits used in the present turn is spared as long as there is anything else, since the experts of a token are
    likely to be those of the next: the most recently used of it, three quarters of the slots at most. A turn is a
    request. Uses are remembered of what is given up, too. Worths are logarithms that grow with the turn of a use:
    waiting does not change them.
    """

    def __init__(self, slots: int) -> None:
        self._turn = self._stamp = 0
        self._idle: set[ExpertKey] = set()
        self._uses: dict[ExpertKey, _Uses] = {}
        self._spared: OrderedDict[ExpertKey, None] = OrderedDict()  # the least recently used first
        self._most_spared = int(SPARED * slots)
        self._queue: list[tuple[float, int, ExpertKey]] = []  # worth and stamp, which may have risen since
        self._queued: set[ExpertKey] = set()

    def __len__(self) -> int:
        return len(self._idle)

    def __contains__(self, key: ExpertKey) -> bool:
        return key in self._idle

    def begin_turn(self) -> None:
        """A request begins."""
        self._turn += 1
        while self._spared:
            self._spare_no_more()

    def lease(self, key: ExpertKey, cost: float) -> None:
        """A lease uses the expert. `cost` is log2 of what reading it takes, over that of the dearest expert."""
        self._use(key, cost)

    def visit(self, key: ExpertKey, cost: float) -> None:
        """A visit uses the expert, which no lease holds: one use in a turn, however many tokens it has."""
        self._use(key, cost)
        self._spared[key] = None
        self._spared.move_to_end(key)
        if len(self._spared) > self._most_spared:
            self._spare_no_more()

    def add(self, key: ExpertKey) -> None:
        """Nobody uses it any more."""
        self._idle.add(key)
        self._enqueue(key)

    def discard(self, key: ExpertKey) -> None:
        """Somebody uses it, if it was idle."""
        self._idle.discard(key)

    def pop(self) -> ExpertKey:
        """The one that is given up first. There must be one."""
        key = self._least()
        if key is None:
            key = next(key for key in self._spared if key in self._idle)
            del self._spared[key]
        self._idle.remove(key)
        return key

    def check(self) -> None:
        """Assert that sets, worths and queue tell the same story."""
        assert len(self._spared) <= self._most_spared
        assert self._idle <= self._queued | self._spared.keys()
        assert sorted(key for _, _, key in self._queue) == sorted(self._queued)
        assert all((worth, stamp) <= self._rank(key) for worth, stamp, key in self._queue)

    def _use(self, key: ExpertKey, cost: float) -> None:
        """Of several uses in one turn, the first counts."""
        uses = self._uses.get(key)
        if uses is None:
            uses = self._uses[key] = _Uses()
        self._stamp += 1
        uses.stamp = self._stamp
        if uses.turn == self._turn:
            return
        uses.turn = self._turn
        now = self._turn / HALF_LIFE + cost
        high, low = max(now, uses.worth), min(now, uses.worth)
        uses.worth = high + log2(1 + 2 ** (low - high))

    def _spare_no_more(self) -> None:
        """The least recently used of the spared."""
        key, _ = self._spared.popitem(last=False)
        if key in self._idle:
            self._enqueue(key)

    def _enqueue(self, key: ExpertKey) -> None:
        if key not in self._queued and key not in self._spared:
            self._queued.add(key)
            heappush(self._queue, (*self._rank(key), key))

    def _least(self) -> ExpertKey | None:
        """Takes what is worth least of all that is idle and not spared from the queue, if there is any."""
        while self._queue:
            worth, stamp, key = self._queue[0]
            if key not in self._idle or key in self._spared:  # it is queued again when that ends
                heappop(self._queue)
                self._queued.remove(key)
            elif (worth, stamp) < self._rank(key):
                heapreplace(self._queue, (*self._rank(key), key))
            else:
                heappop(self._queue)
                self._queued.remove(key)
                return key
        return None

    def _rank(self, key: ExpertKey) -> tuple[float, int]:
        uses = self._uses[key]
        return uses.worth, uses.stamp
