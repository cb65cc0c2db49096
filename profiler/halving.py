"""Successive halving (OpenFE's first stage, arXiv 2211.12507): many candidates on few items, few on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from profiler.evaluate import Measured

C = TypeVar("C")

FIRST = 8  # items of the first round at least: fewer say nothing


@dataclass(frozen=True, slots=True)
class Outcome(Generic[C]):
    """Who was measured on all items, best first, and how many candidates each round began with."""

    ranking: tuple[tuple[C, Measured], ...]
    rounds: tuple[tuple[int, int], ...]  # items so far, candidates


def slices(items: int) -> list[int]:
    """Where the rounds end: an eighth of the items, then twice as many each time, then all."""
    ends = [min(items, max(FIRST, items // 8))]
    while ends[-1] < items:
        ends.append(min(items, 2 * ends[-1]))
    return ends


def halve(
    candidates: Sequence[C], always: Collection[C], ends: Sequence[int], measure: Callable[[C, int, int], Measured]
) -> Outcome[C]:
    """After each round but the last the better half stays, and whoever is in `always`.

    `measure` runs a candidate on items `[start, end)`, each item once. Among equals the earlier candidate is better.
    """
    sums: dict[int, Measured] = {}
    alive, rounds, start = list(range(len(candidates))), [], 0
    for end in ends:
        rounds.append((end, len(alive)))
        for number in alive:
            found = measure(candidates[number], start, end)
            sums[number] = sums[number] + found if number in sums else found
        alive.sort(key=lambda number: (*badness(sums[number]), number))
        if end != ends[-1]:
            rivals = [number for number in alive if candidates[number] not in always]
            staying = set(rivals[: math.ceil(len(rivals) / 2)])
            alive = [number for number in alive if number in staying or candidates[number] in always]
        start = end
    return Outcome(tuple((candidates[number], sums[number]) for number in alive), tuple(rounds))


def badness(measured: Measured) -> tuple[float, float]:
    """Sorts better evidence first: higher accuracy, then lower NLL, as the service does."""
    return -(measured.accuracy if measured.accuracy is not None else 0.0), measured.nll
