"""How sure a size's accuracy is, what it costs off its task, and whether a smaller one would do. Pure.

A smaller size counts as as good as the one that serves where its accuracy lies inside the other's 95% interval: these
items, and these draws of the calibration text, can't tell the two apart. That is no proof that they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from service.serving import Candidate
from store.intervals import wilson
from store.records import Price


@dataclass(frozen=True, slots=True)
class PriceTag:
    """`low` and `high` bound the accuracy with 95%, over items and `draws` draws of the calibration text.

    `others` is the accuracy on other tasks' items, `others_quality` that as a share of the whole model's there.
    """

    low: float | None
    high: float | None
    draws: int
    others: float | None
    others_quality: float | None


def price_tag(candidate: Candidate, prices: Sequence[Price]) -> PriceTag:
    """Of the prices that the profiler stored; an evaluation without one is as sure as its items make it."""
    evidence = candidate.evidence
    mine = [one for one in prices if one.selection == candidate.stored.id]
    own = [one for one in mine if one.text == "own" and one.evaluation_hash == evidence.evaluation_hash]
    off = [one for one in mine if one.text == "others"]
    low, high = None, None
    if own:
        low, high = own[-1].low, own[-1].high
    elif evidence.accuracy is not None:
        low, high = wilson(evidence.accuracy, evidence.items)
    others = off[-1].accuracy if off else None
    full = off[-1].full_accuracy if off else None
    return PriceTag(low, high, len(own[-1].draws) if own else 0, others, others / full if others and full else others)


def smallest_as_good(serves: Candidate, sizes: Sequence[Candidate], prices: Sequence[Price]) -> Candidate | None:
    """The smallest size below the one that serves that the evidence can't tell from it, with as many calls a token;
    None if there is none.
    """
    low = price_tag(serves, prices).low
    if low is None:
        return None
    smaller = [
        one
        for one in sizes
        if one.stored.keep < serves.stored.keep
        and one.stored.active == serves.stored.active
        and one.evidence.accuracy is not None
        and one.evidence.accuracy >= low
    ]
    return min(smaller, key=lambda one: one.stored.keep, default=None)
