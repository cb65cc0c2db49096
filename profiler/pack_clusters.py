"""Spherical k-means, for the recipes that mix experts. Deterministic. n points, K centres, D numbers a point."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 20


def spherical_k_means(points: Tensor, weights: Tensor, seeds: Tensor) -> Tensor:
    """`points` [n, D] of length 1, `weights` [n] > 0, `seeds` [K, D] -> the cluster of each point, i64 [n].

    A cluster that loses all of its points keeps its centre.
    """
    centres = seeds
    found = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        nearest = (points @ centres.T).argmax(dim=1)  # [n]
        if torch.equal(nearest, found):
            break
        found = nearest
        sums = torch.zeros_like(centres).index_add_(0, nearest, points * weights[:, None])  # [K, D]
        empty = torch.bincount(nearest, minlength=len(centres)) == 0  # [K]
        centres = torch.where(empty[:, None], centres, torch.nn.functional.normalize(sums, dim=1))
    return found


def plus_plus(points: Tensor, count: int) -> Tensor:
    """Seeds after k-means++ with its draw replaced by the farthest point, so that nothing is left to chance: the first
    is the point most like all others. [count, D]
    """
    picked = [int((points @ points.sum(dim=0)).argmax())]
    nearest = points @ points[picked[0]]  # [n] cosine to the nearest seed
    for _ in range(count - 1):
        nearest[picked[-1]] = torch.inf  # never again
        picked.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, points @ points[picked[-1]])
    return points[picked]
