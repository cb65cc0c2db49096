"""Mixed traffic through the engine's own table of slots, and through a plain LRU with as many: who reads less.

Masked requests lease their task's selection for as long as they run, exact ones visit what recorded routing says, token
after token. Nothing is read, no model is run; a read is one expert, and all experts are of one size.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from typing import NamedTuple, Protocol

from benchmarks.cache_policies import Request
from engine.residency import ABSENT, Residency
from store.records import ExpertKey

SHARES = (1 / 3, 1 / 2, 2 / 3)  # of all experts that have a slot
TASKS = (3, 10)
EXACT = (0.0, 0.1, 0.5, 1.0)  # of the requests
AT_ONCE = (1, 4)
POPULARITY: Mapping[str, Callable[[int], float]] = {"zipf": lambda rank: 1 / (1 + rank), "uniform": lambda _: 1.0}


class Arrival(NamedTuple):
    request: Request
    exact: bool


@dataclass(frozen=True, slots=True)
class TrafficRow:
    slots: int
    tasks: int
    popularity: str
    exact: float
    at_once: int
    lru_bytes: int
    bytes_read: int
    ratio: float


class Slots(Protocol):
    """Reads of a lease or a visit are its return value."""

    @property
    def available(self) -> int: ...
    def begin_exact(self) -> None: ...
    def unpinned(self, keys: Collection[ExpertKey]) -> int: ...
    def lease(self, keys: Collection[ExpertKey]) -> int: ...
    def release(self, keys: Collection[ExpertKey]) -> None: ...
    def visit(self, key: ExpertKey) -> int: ...


class EngineSlots:
    """engine/residency.py as the bank drives it."""

    def __init__(self, layers: int, experts: int, slots: int) -> None:
        self._residency = Residency(layers, experts, slots)
        self.begin_exact, self.unpinned = self._residency.begin_turn, self._residency.unpinned
        self.release = self._residency.release

    @property
    def available(self) -> int:
        return self._residency.available

    def lease(self, keys: Collection[ExpertKey]) -> int:
        return self._plan(keys, passing=False)

    def visit(self, key: ExpertKey) -> int:
        slot = self._residency.slot(key)
        if slot != ABSENT:
            self._residency.touch(slot)
            return 0
        reads = self._plan([key], passing=True)
        self._residency.release([key])
        return reads

    def _plan(self, keys: Collection[ExpertKey], *, passing: bool) -> int:
        loads = self._residency.plan(keys, passing=passing)
        for load in loads:
            self._residency.landed(load.key)
        return len(loads)


class LruSlots:
    """Whatever no lease holds goes by its last use, whoever used it."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._pins: Counter[ExpertKey] = Counter()
        self._held: OrderedDict[ExpertKey, None] = OrderedDict()  # the least recently used first

    @property
    def available(self) -> int:
        return self._slots - len(self._pins)

    def begin_exact(self) -> None:
        """Nothing changes."""

    def unpinned(self, keys: Collection[ExpertKey]) -> int:
        return sum(key not in self._pins for key in keys)

    def lease(self, keys: Collection[ExpertKey]) -> int:
        self._pins.update(keys)
        return sum(self._use(key) for key in sorted(keys))

    def release(self, keys: Collection[ExpertKey]) -> None:
        self._pins -= Counter(keys)  # keeps what is above 0
        for key in sorted(keys):
            self._held.move_to_end(key)

    def visit(self, key: ExpertKey) -> int:
        return self._use(key)

    def _use(self, key: ExpertKey) -> int:
        missing = key not in self._held
        if missing and len(self._held) == self._slots:
            del self._held[next(each for each in self._held if each not in self._pins)]
        self._held[key] = None
        self._held.move_to_end(key)
        return missing


class _Running:
    """One request: what is left of it goes through a token at a time."""

    def __init__(self, arrival: Arrival, selection: frozenset[ExpertKey], layers: int) -> None:
        self.selection = frozenset[ExpertKey]() if arrival.exact else selection
        steps = arrival.request.steps
        self._exact = arrival.exact
        self._tokens = [steps[start : start + layers] for start in range(0, len(steps), layers)][::-1]

    @property
    def over(self) -> bool:
        return not self._tokens

    def token(self, slots: Slots) -> int:
        """Gives its reads."""
        steps = self._tokens.pop()
        return sum(slots.visit(key) for step in steps for key in step) if self._exact else 0


def replay(
    traffic: Sequence[Arrival], selections: Mapping[str, frozenset[ExpertKey]], slots: Slots, layers: int, at_once: int
) -> int:
    """Experts read. The next request begins where fewer than `at_once` run and there is room, one slot spared for exact
    ones; those that run have a token each in turn."""
    waiting, running, reads = list(reversed(traffic)), list[_Running](), 0
    while waiting or running:
        while waiting and len(running) < at_once and _fits(waiting[-1], selections, slots):
            arrival = waiting.pop()
            running.append(_Running(arrival, selections[arrival.request.task], layers))
            reads += _begin(running[-1], slots)
        reads += sum(one.token(slots) for one in running)
        for one in running:
            if one.over:
                slots.release(one.selection)
        running = [one for one in running if not one.over]
    return reads


def _fits(arrival: Arrival, selections: Mapping[str, frozenset[ExpertKey]], slots: Slots) -> bool:
    wanted = () if arrival.exact else selections[arrival.request.task]
    return slots.unpinned(wanted) < slots.available


def _begin(one: _Running, slots: Slots) -> int:
    if one.selection:
        return slots.lease(one.selection)
    slots.begin_exact()
    return 0


def traffic_of(
    recorded: Mapping[str, Sequence[Request]], tasks: int, popularity: str, exact: float, requests: int, seed: int
) -> list[Arrival]:
    """Each request's task, which of its recordings it is and whether it is exact are drawn anew."""
    rng = random.Random(seed)
    names = sorted(recorded)[:tasks]
    weights = [POPULARITY[popularity](rank) for rank in range(len(names))]
    drawn = (rng.choices(names, weights)[0] for _ in range(requests))
    return [Arrival(rng.choice(recorded[task]), rng.random() < exact) for task in drawn]


def bench_traffic(
    recorded: Mapping[str, Sequence[Request]], selections: Mapping[str, frozenset[ExpertKey]], layers: int,
    experts: int, expert_bytes: int, requests: int, seed: int = 0,
) -> list[TrafficRow]:  # fmt: skip
    rows = []
    for share, tasks, popularity, exact, at_once in product(SHARES, TASKS, POPULARITY, EXACT, AT_ONCE):
        slots = int(share * layers * experts)
        traffic = traffic_of(recorded, tasks, popularity, exact, requests, seed)
        plain = replay(traffic, selections, LruSlots(slots), layers, at_once)
        ours = replay(traffic, selections, EngineSlots(layers, experts, slots), layers, at_once)
        sizes = plain * expert_bytes, ours * expert_bytes
        rows.append(TrafficRow(slots, tasks, popularity, exact, at_once, *sizes, ours / max(1, plain)))
    return rows


def traffic_verdict(rows: Sequence[TrafficRow]) -> str:
    """Where ours reads more than LRU, too."""
    worst = max(rows, key=lambda row: row.ratio)
    worse = sum(row.ratio > 1 for row in rows)
    mean = exp(sum(log(max(row.ratio, 1e-9)) for row in rows) / len(rows))
    return (
        f"the engine's table reads {mean:.3f} of LRU's bytes in the geometric mean of {len(rows)} mixes of masked and "
        f"exact requests, more than LRU in {worse} of them, and at most {worst.ratio:.3f} of it ({worst.slots} slots, "
        f"{worst.tasks} tasks, {worst.popularity}, {worst.exact:.0%} exact, {worst.at_once} at once)."
    )
