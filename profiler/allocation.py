"""From scores to a selection: which experts stay under a budget of bytes, or at a share of them. Pure numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from profiler.allocators import ALLOCATORS, Allocator, Layers
from profiler.extras import NOTHING, Needs
from profiler.scorers.base import Picker, Scorer
from profiler.statistics import Statistics
from store.errors import BudgetError, InvalidInput
from store.records import F64, Selection
from store.sizes import parse_bytes, show_bytes

UNIFORM = "uniform"

Ranking = npt.NDArray[np.int64]


def kept(experts: int, keep: float, top_k: int) -> int:
    """How many experts of a layer a share means: never fewer than one token needs."""
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise InvalidInput(
            f"A share of experts must lie in (0, 1], got {keep}. Say 0.5 for half of them.", param="keep"
        )
    # Half an expert rounds up: Python's round would send 12.5 and 13.5 in different directions.
    return min(experts, max(top_k, math.floor(keep * experts + 0.5)))


def size_of(text: str) -> float | int:
    """What a person wrote: `0.25` is a share of the experts, `512MiB` bytes of them."""
    try:
        share = float(text)
    except ValueError:
        return parse_bytes(text)
    kept(1, share, 1)  # raises for what is no share
    return share


def uniform(scores: F64, keep: float, top_k: int) -> Selection:
    """The same number in every layer, the best by score; among equals the lower id. `scores` is f64 `[L, E]`."""
    return allocate(UNIFORM, scores, keep, top_k)


def allocate(
    allocator: str,
    scores: F64,
    budget: float | int,
    top_k: int,
    expert_bytes: Sequence[int] | None = None,
    statistics: Statistics | None = None,
    strips: int = 1,
) -> Selection:
    """The experts that the allocator keeps, each layer's best by score, at least `top_k` in each. Where these are the
    `strips` of experts (engine/strips.py), a layer keeps some of as many experts as a token goes through.

    `budget` is a share in (0, 1] (a float: the bytes that `uniform` takes for it) or bytes (an int). `expert_bytes` is
    the size of an expert in each layer; without it all are alike, and a budget in bytes counts experts. `statistics`
    are for the allocators that need more than scores; InvalidInput without.
    """
    counts = layer_counts(allocator, scores, budget, top_k, expert_bytes, statistics, strips)
    order = _ranking(scores, top_k, strips)  # [L, E]
    return Selection.of([row[:count].tolist() for row, count in zip(order, counts, strict=True)])


def select(
    scorer: Scorer,
    allocator: str,
    statistics: Statistics,
    budget: float | int,
    expert_bytes: Sequence[int] | None = None,
    strips: int = 1,
) -> Selection:
    """What scorer and allocator keep together."""
    scores = scorer.score(statistics)
    if isinstance(scorer, Picker):
        counts = layer_counts(allocator, scores, budget, statistics.top_k, expert_bytes, statistics)
        return scorer.pick(statistics, counts)
    return allocate(allocator, scores, budget, statistics.top_k, expert_bytes, statistics, strips)


def layer_counts(
    allocator: str,
    scores: F64,
    budget: float | int,
    top_k: int,
    expert_bytes: Sequence[int] | None = None,
    statistics: Statistics | None = None,
    strips: int = 1,
) -> list[int]:
    """How many experts each layer keeps, of the arguments of `allocate`."""
    _check(scores)
    layers, experts = scores.shape
    least = top_k // strips
    costs = [1] * layers if expert_bytes is None else [int(size) for size in expert_bytes]
    size = budget if isinstance(budget, int) else kept(experts, budget, least) * sum(costs)
    if size < least * sum(costs):
        raise BudgetError(
            f"{show_bytes(size)} can't hold {least} experts, what one token needs, in each of {layers} layers: that "
            f"takes {show_bytes(least * sum(costs))}. Give more, or a share."
        )
    chosen = choose_allocators([allocator])[allocator]
    shares = _shares(scores, _ranking(scores, top_k, strips))
    return chosen.rule(Layers(shares, costs, least, _guide(allocator, chosen, statistics)), size)


def choose_allocators(names: Sequence[str]) -> dict[str, Allocator]:
    """The named allocators, in the registry's order. Raises InvalidInput for an unknown name."""
    unknown = [name for name in names if name not in ALLOCATORS]
    if unknown or not names:
        known, wanted = ", ".join(ALLOCATORS), f"no allocator {unknown[0]!r}" if unknown else "nothing to allocate by"
        raise InvalidInput(f"There is {wanted}. Choose from: {known}.", param="allocator")
    return {name: one for name, one in ALLOCATORS.items() if name in names}


def needs_of_allocators(names: Sequence[str]) -> Needs:
    """The extras that have to be collected for these."""
    return NOTHING.union(*(one.needs for one in choose_allocators(names).values()))


def _guide(name: str, allocator: Allocator, statistics: Statistics | None) -> F64 | None:
    if not allocator.needs:
        return None
    [extra] = allocator.needs
    if statistics is None:
        raise InvalidInput(f"The allocator {name} needs the statistic {extra} beside scores.", param="allocator")
    return statistics.total(extra)


def _ranking(scores: F64, top_k: int, strips: int) -> Ranking:
    """Each layer's best first, i64 `[L, E]`; of equals the lower id. Before all others come, where experts have strips,
    the best strip of each of the best experts, as many as a token goes through.
    """
    order: Ranking = np.argsort(-scores, axis=1, kind="stable")
    if strips == 1:
        return order
    return np.stack([_of_several_first(row, top_k // strips, strips) for row in order])


def _of_several_first(row: Ranking, least: int, strips: int) -> Ranking:
    _, firsts = np.unique(row // strips, return_index=True)  # where each expert has its best strip
    ahead = np.sort(firsts)[:least]
    return np.concatenate([row[ahead], np.delete(row, ahead)])


def _shares(scores: F64, order: Ranking) -> F64:
    """Each layer's scores as shares of their sum, f64 `[L, E]` in the order of the ranking; what is below 0 is worth
    nothing.

    A layer in which nothing is worth anything has equal shares. Scores of different layers have no common scale, shares
    have one.
    """
    worth = np.take_along_axis(np.maximum(scores, 0.0), order, axis=1)
    sums = worth.sum(axis=1, keepdims=True)  # [L, 1]
    shares: F64 = np.where(sums > 0, worth / np.where(sums > 0, sums, 1.0), 1.0 / scores.shape[1])
    return shares


def _check(scores: F64) -> None:
    if not np.isfinite(scores).all():
        layer = int(np.argwhere(~np.isfinite(scores))[0, 0])
        raise InvalidInput(
            f"The scores of layer {layer} are not finite, so no expert can be preferred. Profile again in float32."
        )
