"""How many experts each layer gets out of a budget of bytes. Pure numpy; which ones they are is the ranking's business.

L layers, E experts. A rule gets `shares` f64 `[L, E]`: what each layer's experts are worth as shares of their layer's
sum, best first. A layer's coverage is the sum of the shares that it keeps. Every rule starts from `floor` experts in
each layer and never spends more than the budget; a larger budget never makes its own aim worse.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from store.records import F64

Rule = Callable[[F64, Sequence[int], int, int], list[int]]  # shares, bytes of an expert [L], budget, floor -> [L]

CELLS = 1 << 16  # of the knapsack's table, at most: above that, bytes are counted in coarser units, rounded up
NOTHING = 1e-300  # what a coverage of none counts as in a logarithm


def uniform(shares: F64, costs: Sequence[int], budget: int, floor: int) -> list[int]:
    """The same number everywhere."""
    count = min(shares.shape[1], budget // sum(costs))
    return [max(floor, count)] * len(shares)


def one_threshold(shares: F64, costs: Sequence[int], budget: int, floor: int) -> list[int]:
    """The experts with the largest shares of all layers together (PreMoE v3's global variant, on shares)."""
    layers, experts = shares.shape
    rank, layer = (axis.ravel() for axis in np.meshgrid(np.arange(experts), np.arange(layers)))
    order = np.lexsort((layer, rank, -shares.ravel()))  # among equal shares the better rank, then the lower layer
    return _spend((int(layer[i]) for i in order if rank[i] >= floor), costs, budget, [floor] * layers)


def equal_coverage(shares: F64, costs: Sequence[int], budget: int, floor: int) -> list[int]:
    """The lowest coverage of a layer as high as possible (CBA of arXiv 2606.18304 with equal targets).

    The next expert always goes to the layer that is covered least, which is where bisecting a common target ends.
    """
    return _spend(_least_covered_first(shares, floor), costs, budget, [floor] * len(shares))


def knapsack(shares: F64, costs: Sequence[int], budget: int, floor: int) -> list[int]:
    """The product of the layers' coverages as large as possible, exactly: a token passes all layers (ours)."""
    layers, experts = shares.shape
    value = np.log(np.maximum(np.cumsum(shares, axis=1)[:, floor - 1 :], NOTHING))  # [L, E - floor + 1]
    spare = budget - floor * sum(costs)
    unit = max(math.gcd(*costs), -(-spare // CELLS), 1)
    cells = min(spare // unit, sum((experts - floor) * -(-cost // unit) for cost in costs))
    best = np.zeros(cells + 1)
    chosen = np.zeros((layers, cells + 1), np.int64)
    for layer, cost in enumerate(costs):
        before, best = best, np.full(cells + 1, -np.inf)
        for more in range(experts - floor + 1):
            step = -(-more * cost // unit)
            if step > cells:
                break
            gained = before[: cells + 1 - step] + value[layer, more]
            better = gained >= best[step:]  # among equals more experts: the memory is there
            best[step:][better] = gained[better]
            chosen[layer, step:][better] = more
    return _trace(chosen, costs, unit, floor)


ALLOCATORS: Mapping[str, Rule] = {
    "uniform": uniform,
    "global": one_threshold,
    "coverage": equal_coverage,
    "knapsack": knapsack,
}


def _spend(layers: Iterable[int], costs: Sequence[int], budget: int, counts: list[int]) -> list[int]:
    """One more expert for each of `layers` in turn, until the first that the budget does not hold: so that a larger

    budget keeps everything that a smaller one keeps.
    """
    left = budget - sum(count * cost for count, cost in zip(counts, costs, strict=True))
    for layer in layers:
        left -= costs[layer]
        if left < 0:
            break
        counts[layer] += 1
    return counts


def _least_covered_first(shares: F64, floor: int) -> Iterator[int]:
    covered = np.cumsum(shares, axis=1)  # [L, E]
    queue = [(float(row[floor - 1]), floor, layer) for layer, row in enumerate(covered)]
    heapq.heapify(queue)
    while queue:
        _, count, layer = heapq.heappop(queue)
        if count < shares.shape[1]:
            yield layer
            heapq.heappush(queue, (float(covered[layer, count]), count + 1, layer))


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
