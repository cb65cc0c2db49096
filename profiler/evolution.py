"""Selections that breed (EEP's first phase, arXiv 2407.00945): kept experts are swapped for others, the fitter stay.

No gradients and no scores: fitness is what the model gets right on calibration items inside the selection. Children
swap experts within a layer, as the source's do, and give room from one layer to another (ours), so that breeding shares
out bytes between layers as an allocator does. The source goes on to merge experts by weights that it searches too;
weights are as they are here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from profiler.evaluate import Measured
from profiler.halving import badness
from store.records import Selection

NAME, ALLOCATOR, VERSION = "eep", "evolved", "2"

CHANGED, REDRAWN = 0.25, 0.15  # of the source: layers that a mutation touches, experts in them that it redraws
CROSSED = 0.3  # how often a child takes whole layers from two parents
MOVED = 0.3  # how often a child gives up an expert in one layer for one in another; the source has equal layers
PARENTS = 6  # the fittest so far, as the source has at least

Fitness = Callable[[Selection], Measured]


@dataclass(frozen=True, slots=True)
class Room:
    """What children stay within: `experts` E of a layer, at least `floor` in each, `budget` bytes in all. `costs` [L]
    are bytes of one expert.
    """

    experts: int
    floor: int
    costs: Sequence[int]
    budget: int

    def holds(self, layers: Sequence[Sequence[int]]) -> bool:
        """Whether the bytes suffice for these experts of each layer."""
        return sum(len(ids) * cost for ids, cost in zip(layers, self.costs, strict=True)) <= self.budget


def evolve(start: Sequence[Selection], room: Room, evaluations: int, fitness: Fitness) -> Selection:
    """The fittest of `start` and of as many children as `evaluations` leave room for.

    Never less fit than the fittest of `start`, which is within `room`; the same start gives the same child. Equal sets
    are tried once.
    """
    random = np.random.default_rng(_seed(start))
    tried = {one: badness(fitness(one)) for one in dict.fromkeys(start)}
    barren = 0
    while len(tried) < len(set(start)) + evaluations and barren < evaluations:
        parents = sorted(tried, key=lambda one: (*tried[one], one.digest))[:PARENTS]
        child = _child(parents, room, random)
        barren += child in tried
        if child not in tried:
            tried[child] = badness(fitness(child))
    return min(tried, key=lambda one: (*tried[one], one.digest))


def start_above(smaller: Selection, start: Sequence[Selection]) -> list[Selection]:
    """What a larger size starts with, too, once a smaller one was bred: that one as it is, so that more bytes never
    make the fittest less fit, and each of `start` with what fits of it.
    """
    return [*start, smaller, *(grown(smaller, one) for one in start)]


def grown(small: Selection, large: Selection) -> Selection:
    """`large`, with what fits of `small` in place of experts that `small` does without."""
    layers = []
    for few, many in zip(small.experts, large.experts, strict=True):
        ids = list(few[: len(many)])
        layers.append(ids + [expert for expert in many if expert not in ids][: len(many) - len(ids)])
    return Selection.of(layers)


def _child(parents: Sequence[Selection], room: Room, random: np.random.Generator) -> Selection:
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
        layers[at] = _mutated(layers[at], room.experts, random)
    if random.random() < MOVED:
        layers = _moved(layers, room, random)
    return Selection.of(layers)


def _moved(layers: list[list[int]], room: Room, random: np.random.Generator) -> list[list[int]]:
    """One expert less in a layer that can spare it, one more in another; as it was where that is one too large."""
    giving, taking = (int(each) for each in random.integers(len(layers), size=2))
    free = [expert for expert in range(room.experts) if expert not in layers[taking]]
    if giving == taking or len(layers[giving]) <= room.floor or not free:
        return layers
    moved = [list(ids) for ids in layers]
    moved[giving].pop(int(random.integers(len(moved[giving]))))
    moved[taking].append(free[int(random.integers(len(free)))])
    return moved if room.holds(moved) else layers


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
