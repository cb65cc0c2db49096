"""Experts that behave alike, clustered by STUN's rule, as a ranking. Pure numpy; knows no statistic by name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from store.records import F64


def absorbed_at(distances: F64, worth: F64, used: npt.NDArray[np.bool_]) -> F64:
    """How long each expert stays its cluster's survivor while clusters grow: f64 `[L, E]` >= 0, higher is longer.

    `distances` is f64 `[L, E, E]`, symmetric. Of two clusters that merge, the survivor with more `worth` `[L, E]` stays
    (among equals the lower id). Experts that are not `used` `[L, E]` get 0.
    """
    scores = np.zeros_like(worth)
    for layer in range(len(worth)):
        ids = np.flatnonzero(used[layer])
        if len(ids):
            scores[layer, ids] = _from_zero(heights(distances[layer][np.ix_(ids, ids)], worth[layer, ids]))
    return scores


def heights(distances: F64, worth: F64) -> F64:
    """The threshold at which each of E experts is absorbed, infinite for the last one left. f64 `[E]`.

    STUN merges the clusters A and B of a pair (i, j) when j is within the threshold of all of A and i of all of B. The
    lowest threshold at which A and B merge is therefore the larger of `min_j max_{a in A} D(j, a)` over j in B and
    `min_i max_{b in B} D(i, b)` over i in A: i and j are independent.
    """
    count = len(distances)
    farthest = distances.astype(np.float64).copy()  # [E, C] of expert j to the farthest member of cluster c
    np.fill_diagonal(farthest, -np.inf)
    nearest = farthest.T.copy()  # [C, C] of cluster a to the member of b that is nearest to all of a
    np.fill_diagonal(nearest, np.inf)
    member, survivor = np.arange(count), np.arange(count)  # cluster of each expert, survivor of each cluster
    absorbed = np.full(count, np.inf)
    for _ in range(count - 1):
        merge = np.maximum(nearest, nearest.T)
        a, b = sorted(int(i) for i in np.unravel_index(np.argmin(merge), merge.shape))
        stays, goes = _ranked(survivor[a], survivor[b], worth)
        absorbed[goes], survivor[a] = merge[a, b], stays
        member[member == b] = a
        farthest[:, a] = np.maximum(farthest[:, a], farthest[:, b])
        nearest[:, a] = np.minimum(nearest[:, a], nearest[:, b])
        row = np.full(count, np.inf)
        np.minimum.at(row, member, farthest[:, a])
        nearest[a] = row
        nearest[a, a] = nearest[b] = nearest[:, b] = np.inf
    return absorbed


def _ranked(one: np.int64, other: np.int64, worth: F64) -> tuple[int, int]:
    first, second = sorted((int(one), int(other)))
    return (first, second) if worth[first] >= worth[second] else (second, first)


def _from_zero(absorbed: F64) -> F64:
    """Heights as scores above 0: the last one left is as far above the second as the second above the first."""
    finite = absorbed[np.isfinite(absorbed)]
    if not finite.size:
        return np.ones_like(absorbed)
    low, high = finite.min(), finite.max()
    step = (high - low) or 1.0
    scores: F64 = np.where(np.isfinite(absorbed), (absorbed - low) / step, 2.0) + 1.0
    return scores
