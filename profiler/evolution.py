"""Selections that breed (EEP's first phase, arXiv 2407.00945): kept experts are swapped for others, the fitter stay.

No gradients and no scores: fitness is what the model gets right on calibration items inside the selection. Every child
keeps as many experts in each layer as a parent, so bytes and floor hold. The source goes on to merge experts by
weights that it searches too; weights are as they are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from profiler.evaluate import Measured
from profiler.halving import badness
from store.records import Selection

NAME, ALLOCATOR, VERSION = "eep", "evolved", "1"

CHANGED, REDRAWN = 0.25, 0.15  # of the source: layers that a mutation touches, experts in them that it redraws
CROSSED = 0.3  # how often a child takes whole layers from two parents
PARENTS = 6  # the fittest so far, as the source has at least

Fitness = Callable[[Selection], Measured]


def evolve(start: Sequence[Selection], experts: int, evaluations: int, fitness: Fitness) -> Selection:
    """The fittest of `start` and of as many children as `evaluations` leave room for.

    Never less fit than the fittest of `start`; the same start gives the same child. Equal sets are tried once.
    """
    random = np.random.default_rng(_seed(start))
    tried = {one: badness(fitness(one)) for one in dict.fromkeys(start)}
    barren = 0
    while len(tried) < len(set(start)) + evaluations and barren < evaluations:
        parents = sorted(tried, key=lambda one: (*tried[one], one.digest))[:PARENTS]
        child = _child(parents, experts, random)
        barren += child in tried
        if child not in tried:
            tried[child] = badness(fitness(child))
    return min(tried, key=lambda one: (*tried[one], one.digest))


def grown(small: Selection, large: Selection) -> Selection:
    """`large`, with what fits of `small` in place of experts that `small` does without: a larger size starts there."""
    layers = []
    for few, many in zip(small.experts, large.experts, strict=True):
        ids = list(few[: len(many)])
        layers.append(ids + [expert for expert in many if expert not in ids][: len(many) - len(ids)])
    return Selection.of(layers)


def _child(parents: Sequence[Selection], experts: int, random: np.random.Generator) -> Selection:
    mother = parents[int(random.integers(len(parents)))]
    layers = [list(ids) for ids in mother.experts]
    if random.random() < CROSSED:
        father = parents[int(random.integers(len(parents)))]
        for layer, ids in enumerate(father.experts):
            if len(ids) == len(layers[layer]) and random.random() < 0.5:
                layers[layer] = list(ids)
    touched = random.random(len(layers)) < CHANGED
    touched[int(random.integers(len(layers)))] = True
    for at in np.flatnonzero(touched).tolist():
        layers[at] = _mutated(layers[at], experts, random)
    return Selection.of(layers)


def _mutated(ids: list[int], experts: int, random: np.random.Generator) -> list[int]:
    """Some experts, at least one, in exchange for others that are not there."""
    free = [expert for expert in range(experts) if expert not in ids]
    redrawn = random.random(len(ids)) < REDRAWN
    redrawn[int(random.integers(len(ids)))] = True
    leaving = np.flatnonzero(redrawn)[: len(free)]
    kept = list(ids)
    for place, expert in zip(leaving, random.permutation(free)[: len(leaving)], strict=True):
        kept[place] = int(expert)
    return kept


def _seed(start: Sequence[Selection]) -> int:
    return int(hashlib.sha256("".join(one.digest for one in start).encode()).hexdigest()[:8], 16)
