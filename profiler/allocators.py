"""How many experts each layer gets out of a budget of bytes. Pure numpy; which ones they are is the ranking's business.

L layers, E experts. A rule sees `shares` f64 `[L, E]`: what each layer's experts are worth as shares of their layer's
sum, best first. A layer's coverage is the sum of the shares that it keeps. Every rule starts from `floor` experts in
each layer and never spends more than the budget; a larger budget never makes its own aim worse.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from profiler.extras import NOTHING, Needs
from store.records import F64


@dataclass(frozen=True, slots=True)
class Layers:
    """What is shared out. `costs` [L] are bytes of one expert; `guide` is the extra that the rule needs, if it does."""

    shares: F64  # [L, E]
    costs: Sequence[int]
    floor: int
    guide: F64 | None = None

    @property
    def count(self) -> int:
        return int(self.shares.shape[0])

    @property
    def experts(self) -> int:
        return int(self.shares.shape[1])


@dataclass(frozen=True, slots=True)
class Allocator:
    """`needs` names at most one extra (extras.py) that the rule reads beside the scores. A changed rule is a new
    `version`, which makes new selections.
    """

    rule: Callable[[Layers, int], list[int]]  # what is shared out, the budget in bytes -> experts of each layer [L]
    needs: Needs = NOTHING
    version: str = "1"


CELLS = 1 << 16  # of the knapsack's table, at most: above that, bytes are counted in coarser units, rounded up
ROUNDING = 1e-12  # of a sum of shares
NONE = 1e-300  # what a coverage of none counts as in a logarithm


STEEPNESS, MIDDLE = 0.8, 0.3  # of SEAP's curve over depth


def uniform(layers: Layers, budget: int) -> list[int]:
    """The same number everywhere."""
    count = min(layers.experts, budget // sum(layers.costs))
    return [max(layers.floor, count)] * layers.count


def one_threshold(layers: Layers, budget: int) -> list[int]:
    """The experts with the largest shares of all layers together (PreMoE v3's global variant, on shares)."""
    return _best_first(layers, layers.shares, budget)


def equal_coverage(layers: Layers, budget: int) -> list[int]:
    """The lowest coverage of a layer as high as possible (CBA of arXiv 2606.18304 with equal targets).

    The next expert always goes to the layer that is covered least, which is where bisecting a common target ends.
    """
    return _spend(_least_covered_first(layers.shares, layers.floor), layers, budget)


def logistic(layers: Layers, budget: int) -> list[int]:
    """Early layers keep more, along a logistic curve over depth (SEAP, arXiv 2503.07605), whatever the scores say.

    Layer l loses `a / (1 + exp(-0.8 (x_l - 0.3)))` of its experts, x_l from 0 to 1. An expert stays as long as `a` is
    below the value at which its layer loses it, so a larger budget, a smaller `a`, keeps what a smaller one kept.
    """
    depth = np.linspace(0.0, 1.0, layers.count)  # [L]
    lost = 1.0 / (1.0 + np.exp(-STEEPNESS * (depth - MIDDLE)))  # [L], times a
    stays_until = (1.0 - (np.arange(layers.experts) + 0.5) / layers.experts)[None, :] / lost[:, None]  # [L, E]
    return _best_first(layers, stays_until, budget)


def knapsack(layers: Layers, budget: int) -> list[int]:
    """The product of the layers' coverages as large as possible, exactly: a token passes all layers (ours)."""
    covered = _covered(layers.shares)[:, layers.floor - 1 :]  # [L, E - floor + 1]
    return _largest_sum(np.log(np.maximum(covered, NONE)), layers, budget)


def least_error(layers: Layers, budget: int) -> list[int]:
    """The sum of the layers' measured errors as small as possible, exactly (LExI's program, arXiv 2509.02753).

    LExI shares out how many experts run, which frees no memory; here its dynamic program shares out how many stay. The
    error of a layer that keeps m experts is what NAEE's elimination measured when m were left.
    """
    assert layers.guide is not None, "the caller sees to the needs"
    dropped_at = np.sort(layers.guide, axis=1)[:, ::-1]  # [L, E], the m-th: the error once the m-th last is gone too
    left = np.concatenate([dropped_at[:, 1:], np.zeros((layers.count, 1))], axis=1)  # [L, E], with m = 1 ... E left
    return _largest_sum(-left[:, layers.floor - 1 :], layers, budget)


def learned(layers: Layers, budget: int) -> list[int]:
    """One threshold on shares times a weight of the layer, learned by gradients (DiEP's beta, arXiv 2509.16105)."""
    assert layers.guide is not None, "the caller sees to the needs"
    return _best_first(layers, layers.shares * layers.guide.mean(axis=1, keepdims=True), budget)


ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": Allocator(uniform),
    "global": Allocator(one_threshold),
    "coverage": Allocator(equal_coverage, version="2"),
    "knapsack": Allocator(knapsack, version="2"),
    "logistic": Allocator(logistic),
    "lexi": Allocator(least_error, frozenset({"elimination"})),
    "diep": Allocator(learned, frozenset({"relaxation"})),
}

PLAIN: tuple[str, ...] = tuple(name for name, one in ALLOCATORS.items() if not one.needs)


def _best_first(layers: Layers, worth: F64, budget: int) -> list[int]:
    """The experts of the largest `worth` [L, E] of all layers; within a layer it falls from rank to rank."""
    count, experts = worth.shape
    rank, layer = (axis.ravel() for axis in np.meshgrid(np.arange(experts), np.arange(count)))
    order = np.lexsort((layer, rank, -worth.ravel()))  # among equals the better rank, then the lower layer
    return _spend((int(layer[i]) for i in order if rank[i] >= layers.floor), layers, budget)


def _spend(order: Iterable[int], layers: Layers, budget: int) -> list[int]:
    """One more expert for each layer of `order` in turn, until the first that the budget does not hold: so that a

    larger budget keeps everything that a smaller one keeps.
    """
    counts = [layers.floor] * layers.count
    left = budget - layers.floor * sum(layers.costs)
    for layer in order:
        left -= layers.costs[layer]
        if left < 0:
            break
        counts[layer] += 1
    return counts


def _covered(shares: F64) -> F64:
    """A layer's coverage with its best 1, 2, ... E experts, f64 `[L, E]`.

    What is covered but for rounding is covered: else noise in the last bit would say which layer gets the next expert.
    """
    sums = np.cumsum(shares, axis=1)
    covered: F64 = np.where(sums > 1 - ROUNDING, 1.0, sums)
    return covered


def _least_covered_first(shares: F64, floor: int) -> Iterator[int]:
    covered = _covered(shares)
    queue = [(float(row[floor - 1]), floor, layer) for layer, row in enumerate(covered)]
    heapq.heapify(queue)
    while queue:
        _, count, layer = heapq.heappop(queue)
        if count < shares.shape[1]:
            yield layer
            heapq.heappush(queue, (float(covered[layer, count]), count + 1, layer))


def _largest_sum(value: F64, layers: Layers, budget: int) -> list[int]:
    """The counts whose `value` [L, E - floor + 1] adds up to most, by dynamic programming over bytes."""
    spare = budget - layers.floor * sum(layers.costs)
    room = layers.experts - layers.floor
    unit = max(math.gcd(*layers.costs), -(-spare // CELLS), 1)
    cells = min(spare // unit, sum(room * -(-cost // unit) for cost in layers.costs))
    best = np.zeros(cells + 1)
    chosen = np.zeros((layers.count, cells + 1), np.int64)
    for layer, cost in enumerate(layers.costs):
        before, best = best, np.full(cells + 1, -np.inf)
        for more in range(room + 1):
            step = -(-more * cost // unit)
            if step > cells:
                break
            gained = before[: cells + 1 - step] + value[layer, more]
            better = gained >= best[step:]  # among equals more experts: the memory is there
            best[step:][better] = gained[better]
            chosen[layer, step:][better] = more
    return _trace(chosen, layers.costs, unit, layers.floor)


def _trace(
    chosen: np.ndarray[tuple[int, int], np.dtype[np.int64]], costs: Sequence[int], unit: int, floor: int
) -> list[int]:
    """The counts that led to the best cell: the last one, since a wider table is never worse."""
    at, counts = chosen.shape[1] - 1, [floor] * len(costs)
    for layer in reversed(range(len(costs))):
        more = int(chosen[layer, at])
        counts[layer] += more
        at -= -(-more * costs[layer] // unit)
    return counts
