"""Replays recorded routing through caches of equal size: what each policy would have had to read.

A trace is a list of steps; a step is the experts that one forward needs of one layer: a prompt's, or one token's.
Pure Python over `ExpertKey`s; nothing is read, no model is run. A miss is one expert read, whatever happens to it then.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from store.records import ExpertKey

Step = tuple[ExpertKey, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One request's needs in order. `task` is what retrieval would have named."""

    task: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Tally:
    """Of all expert uses, how many found their expert; and how many experts were read, preloading included."""

    uses: int
    hits: int
    reads: int

    @property
    def hit_rate(self) -> float:
        return self.hits / self.uses if self.uses else 1.0


def lru(trace: Sequence[Request], slots: int) -> Tally:
    held: OrderedDict[ExpertKey, None] = OrderedDict()
    hits = uses = 0
    for key in _uses(trace):
        uses += 1
        if key in held:
            hits += 1
            held.move_to_end(key)
            continue
        if len(held) >= slots:
            held.popitem(last=False)
        held[key] = None
    return Tally(uses, hits, uses - hits)


def lfu(trace: Sequence[Request], slots: int) -> Tally:
    """Evicts what was used least often so far, the least recently used among equals."""
    held: set[ExpertKey] = set()
    count: Counter[ExpertKey] = Counter()
    queue: list[tuple[int, int, ExpertKey]] = []  # count, time, key; entries that are out of date are skipped
    hits = uses = 0
    for key in _uses(trace):
        uses += 1
        count[key] += 1
        if key in held:
            hits += 1
        else:
            if len(held) >= slots:
                _evict_least(held, count, queue)
            held.add(key)
        heapq.heappush(queue, (count[key], uses, key))
    return Tally(uses, hits, uses - hits)


def _evict_least(held: set[ExpertKey], count: Mapping[ExpertKey, int], queue: list[tuple[int, int, ExpertKey]]) -> None:
    while True:
        seen, _, key = heapq.heappop(queue)
        if key in held and count[key] == seen:
            held.remove(key)
            return


def belady(trace: Sequence[Request], slots: int) -> Tally:
    """The optimum in hindsight: evicts what is needed again last. Nothing that may be built; a bound."""
    uses = list(_uses(trace))
    following = _next_use(uses)
    held: dict[ExpertKey, int] = {}
    queue: list[tuple[int, ExpertKey]] = []  # minus the next use, so that the farthest comes first
    hits = 0
    for place, key in enumerate(uses):
        if key in held:
            hits += 1
        elif len(held) >= slots:
            _evict_farthest(held, queue)
        held[key] = following[place]
        heapq.heappush(queue, (-following[place], key))
    return Tally(len(uses), hits, len(uses) - hits)


def _next_use(uses: Sequence[ExpertKey]) -> list[int]:
    """For each use the place of the next one of the same expert, or one past the end."""
    following = [len(uses)] * len(uses)
    ahead: dict[ExpertKey, int] = {}
    for place in range(len(uses) - 1, -1, -1):
        following[place] = ahead.get(uses[place], len(uses))
        ahead[uses[place]] = place
    return following


def _evict_farthest(held: dict[ExpertKey, int], queue: list[tuple[int, ExpertKey]]) -> None:
    while True:
        place, key = heapq.heappop(queue)
        if held.get(key) == -place:
            del held[key]
            return


def fixed(trace: Sequence[Request], kept: frozenset[ExpertKey]) -> Tally:
    """One set for all requests, read once; every other use is a read that leaves nothing behind."""
    uses = list(_uses(trace))
    hits = sum(key in kept for key in uses)
    return Tally(len(uses), hits, len(kept) + len(uses) - hits)


def profile(trace: Sequence[Request], selections: Mapping[str, frozenset[ExpertKey]]) -> Tally:
    """The task's own set, swapped by difference when the task changes; misses are read and leave nothing behind."""
    held: frozenset[ExpertKey] = frozenset()
    uses = hits = reads = 0
    for request in trace:
        wanted = selections[request.task]
        reads += len(wanted - held)
        held = wanted
        for key in _uses([request]):
            uses += 1
            hits += key in held
    return Tally(uses, hits, reads + uses - hits)


def masked(trace: Sequence[Request], selections: Mapping[str, frozenset[ExpertKey]]) -> Tally:
    """As `profile`, but uses outside the set are routed elsewhere inside it and read nothing: that costs accuracy."""
    tally = profile(trace, selections)
    return Tally(tally.uses, tally.hits, tally.reads - (tally.uses - tally.hits))


def _uses(trace: Iterable[Request]) -> Iterable[ExpertKey]:
    return (key for request in trace for step in request.steps for key in step)


Online = Callable[[Sequence[Request], int], Tally]
ONLINE: Mapping[str, Online] = {"lru": lru, "lfu": lfu, "belady": belady}
