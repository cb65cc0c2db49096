"""What runs next: an order of requests in which few wait for long and few swaps are made. Pure policy.

Knows what is asked for, since when, and what a swap costs; no tensors, no slots, no clock of its own. A *swap* is an
admission whose experts are not all resident; what is resident is *settled*.

1. Settled requests go first, the oldest before the others, those of a session that was served lately before all.
2. While others wait for a swap, the settled have a turn: so many requests or so many seconds. Then the next swap goes
   first, and if it does not fit beside what runs, nothing else is admitted until it does.
3. Among swaps the selection with the highest response ratio is next: the sum of (wait + cost) / cost over its requests,
   so that many waiting for a cheap swap go before one waiting for a dear swap, and waiting always wins in the end.
4. A request that has waited for `wait_seconds` is the next swap whatever its ratio. It does not cut a turn short: where
   everybody waits for too long, swapping for each would make all wait longer.
5. Background requests never cause a swap: they are admitted when nobody else waits and their experts are resident.
   One that has waited for `background_seconds` is given up.
6. While as many rows wait for the disk as may, swaps are not considered and hold nobody up.
7. Where more wait in front than rows are free, kin of what was admitted last go first among the settled: those whose
   experts beside its own add at most `kin_share` to what a step takes. Batches become mostly of one task,
   whose experts are read once for all its rows. Nobody is overtaken by kin more than `kin_requests` times, nor once
   `wait_seconds` have passed since the first time: as long as such a one waits, the oldest goes first. Exact requests
   may need any expert, so they are nobody's kin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

from store.records import Selection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rules:
    """How patient the policy is."""

    turn_requests: int = 16
    turn_seconds: float = 2.0
    wait_seconds: float = 10.0
    session_seconds: float = 30.0
    background_seconds: float = 30.0
    kin_requests: int = 8
    kin_share: float = 0.2  # infinite: all are kin, so the oldest goes first


class Room(Protocol):
    """What the policy asks of the engine at a token boundary. A selection None stands for all experts."""

    @property
    def idle(self) -> bool:
        """Nothing runs: whatever can be served at all fits."""

    @property
    def may_swap(self) -> bool:
        """Whether one more row may wait for the disk. True where nothing runs."""

    @property
    def free_rows(self) -> int:
        """How many may be admitted before one that runs ends."""

    def fits(self, selection: Selection | None) -> bool:
        """Whether there is a row, and slots beside those leased."""

    def swap_seconds(self, selection: Selection | None) -> float:
        """How long paging in what is missing takes; 0 where nothing is."""

    def share_beside(self, selection: Selection, other: Selection) -> float:
        """Bytes of the experts of `selection` that `other` has not, over all that a step of rows of `other` takes."""


@dataclass(frozen=True, slots=True, eq=False)
class Waiting(Generic[T]):
    """A request in the queue: `job` is the caller's own. `order` counts up in the order of arrival."""

    job: T
    selection: Selection | None
    submitted: float
    order: int
    background: bool = False
    session: str | None = None


@dataclass(slots=True)
class _Turn:
    """The settled are served although others wait for a swap."""

    since: float
    served: int = 0


@dataclass(slots=True)
class _Overtaken:
    """By kin of others."""

    since: float
    times: int = 0


class Scheduler(Generic[T]):
    """The queue. Not thread-safe: whoever shares it holds a lock."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._queue: list[Waiting[T]] = []
        self._turn: _Turn | None = None
        self._sessions: dict[str, float] = {}
        self._leader: Selection | None = None  # admitted last; None: nobody, or one that may need any expert
        self._overtaken: dict[Waiting[T], _Overtaken] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def jobs(self) -> list[T]:
        """All that wait; one look at the list, so callable from any thread."""
        return [waiting.job for waiting in tuple(self._queue)]

    def add(self, waiting: Waiting[T]) -> None:
        self._queue.append(waiting)

    def drop(self, unwanted: Callable[[T], bool]) -> list[Waiting[T]]:
        """Take out the requests whose job is unwanted, such as those cancelled."""
        gone = [waiting for waiting in self._queue if unwanted(waiting.job)]
        if gone:
            self._queue = [waiting for waiting in self._queue if waiting not in gone]
        for waiting in gone:
            self._overtaken.pop(waiting, None)
        return gone

    def overdue(self, now: float) -> list[Waiting[T]]:
        """Take out the background requests that waited for too long."""
        limit = self.rules.background_seconds
        late = [waiting for waiting in self._queue if waiting.background and now - waiting.submitted >= limit]
        self._queue = [waiting for waiting in self._queue if waiting not in late]
        return late

    @property
    def only_background(self) -> bool:
        """Whether nobody waits in front, so that perhaps nothing may be admitted although nothing runs."""
        return all(waiting.background for waiting in self._queue)

    def has_before(self, order: int) -> bool:
        """Whether anything waits that arrived before that place; what is in the background holds nobody up."""
        return any(waiting.order < order for waiting in self._queue if not waiting.background)

    def has_settled(self, room: Room, before: int | None = None) -> bool:
        """Whether somebody waits whose experts are resident and who fits; in the background nobody is in a hurry."""
        queue = [w for w in self._queue if not w.background and (before is None or w.order < before)]
        wanted = {waiting.selection for waiting in queue}
        return any(room.swap_seconds(selection) == 0 and room.fits(selection) for selection in wanted)

    def next(self, room: Room, now: float, before: int | None = None) -> Waiting[T] | None:
        """Take out what is to be admitted now; None where all shall wait for the next boundary.

        `before` limits the choice to what arrived before that place. Never None where the room is idle and somebody
        waits in front.
        """
        queue = [waiting for waiting in self._queue if before is None or waiting.order < before]
        if not queue:
            return None
        costs = {selection: room.swap_seconds(selection) for selection in {waiting.selection for waiting in queue}}
        chosen = self._choose(queue, costs, room, now)
        if chosen is not None:
            self._queue.remove(chosen)
            self._note(chosen, costs[chosen.selection] > 0, now)
        return chosen

    def _choose(
        self, queue: Sequence[Waiting[T]], costs: dict[Selection | None, float], room: Room, now: float
    ) -> Waiting[T] | None:
        front = [waiting for waiting in queue if not waiting.background]
        if not front:
            return _fitting([waiting for waiting in queue if costs[waiting.selection] == 0], room)
        swaps = [waiting for waiting in front if costs[waiting.selection] > 0 and (room.idle or room.may_swap)]
        settled = [waiting for waiting in front if costs[waiting.selection] == 0]
        if first := self._first(swaps, costs, now):
            return first if room.idle or room.fits(first.selection) else None
        kin = self._kin(front, settled, room, now)
        settled.sort(key=lambda w: (not self._recent(w, now), w.selection not in kin, w.order))
        chosen = _fitting([*settled, *self._ranked(swaps, costs, now)], room)
        if chosen is not None and chosen.selection in kin and not self._recent(chosen, now):
            self._count([waiting for waiting in settled if waiting.order < chosen.order], room, now)
        return chosen

    def _kin(
        self, front: Sequence[Waiting[T]], settled: Sequence[Waiting[T]], room: Room, now: float
    ) -> set[Selection | None]:
        """The selections that go before older ones; none where everybody finds a row, or one was overtaken enough."""
        leader = None if room.idle or len(front) <= room.free_rows else self._leader
        if leader is None or any(self._had_enough(waiting, now) for waiting in settled):
            return set()
        wanted = {waiting.selection for waiting in settled}
        return {one for one in wanted if one and room.share_beside(one, leader) <= self.rules.kin_share}

    def _had_enough(self, waiting: Waiting[T], now: float) -> bool:
        overtaken = self._overtaken.get(waiting)
        if overtaken is None:
            return False
        return overtaken.times >= self.rules.kin_requests or now - overtaken.since >= self.rules.wait_seconds

    def _count(self, older: Sequence[Waiting[T]], room: Room, now: float) -> None:
        """One more goes before those of them that fit."""
        fits = {selection: room.fits(selection) for selection in {waiting.selection for waiting in older}}
        for waiting in older:
            if fits[waiting.selection]:
                self._overtaken.setdefault(waiting, _Overtaken(now)).times += 1

    def _first(
        self, swaps: Sequence[Waiting[T]], costs: dict[Selection | None, float], now: float
    ) -> Waiting[T] | None:
        """The swap that everybody has to wait for: the best, once the turn of the settled is over."""
        if not swaps:
            self._turn = None
            return None
        self._turn = self._turn or _Turn(now)
        over = self._turn.served >= self.rules.turn_requests or now - self._turn.since >= self.rules.turn_seconds
        return self._ranked(swaps, costs, now)[0] if over else None

    def _ranked(
        self, swaps: Sequence[Waiting[T]], costs: dict[Selection | None, float], now: float
    ) -> list[Waiting[T]]:
        """Those that waited for too long, then by the response ratio of their selections; the oldest first."""
        ratios: dict[Selection | None, float] = {}
        for waiting in swaps:
            cost = costs[waiting.selection]
            ratios[waiting.selection] = ratios.get(waiting.selection, 0.0) + (now - waiting.submitted + cost) / cost

        def rank(waiting: Waiting[T]) -> tuple[float, int]:
            late = now - waiting.submitted >= self.rules.wait_seconds
            return (-inf if late else -ratios[waiting.selection]), waiting.order

        return sorted(swaps, key=rank)

    def _recent(self, waiting: Waiting[T], now: float) -> bool:
        served = self._sessions.get(waiting.session or "")
        return served is not None and now - served < self.rules.session_seconds

    def _note(self, chosen: Waiting[T], swaps: bool, now: float) -> None:
        self._leader = chosen.selection
        self._overtaken.pop(chosen, None)
        if swaps:
            self._turn = None
        elif self._turn is not None:
            self._turn.served += 1
        if chosen.session:
            self._sessions = {name: at for name, at in self._sessions.items() if now - at < self.rules.session_seconds}
            self._sessions[chosen.session] = now


def _fitting(ranked: Iterable[Waiting[T]], room: Room) -> Waiting[T] | None:
    """The first that fits; the first of all where nothing runs. Each selection is asked about once."""
    refused: set[Selection | None] = set()
    for waiting in ranked:
        if room.idle:
            return waiting
        if waiting.selection not in refused:
            if room.fits(waiting.selection):
                return waiting
            refused.add(waiting.selection)
    return None
