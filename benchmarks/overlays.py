"""Recipes that leave a checkpoint's shape as it is and change weights in it, to measure what no checkpoint can say.

An expert whose weights were replaced is asked for like any other, by the free router: that is what a stand-in means.
Its bytes are counted by whoever compares, since the file has all of them. E experts, F channels, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engine.channels import Expert
from profiler.pack_mixtures import Outputs, clusters, mean_of
from profiler.pack_recipes import NewLayer, one_hot
from store.errors import BudgetError
from store.records import F64, Selection

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ClusterStandIns:
    """Sub-MoE's stand-in: experts outside `selection` are clustered by their outputs, and each becomes its cluster's
    mean by how often its members were chosen. A layer takes the bytes of its selection and of `count` experts more.
    """

    selection: Selection
    count: int
    outputs: Outputs
    frequency: F64  # [L, E]
    width: int
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    @property
    def kept(self) -> int:
        return int(self.frequency.shape[1])

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        made, ids = list(experts), self.selection.experts[layer]
        others = [each for each in range(len(experts)) if each not in ids]
        if others:
            found = clusters(self.outputs(layer)[:, others], min(self.count, len(others)))  # [E - kept]
            weights = torch.from_numpy(self.frequency[layer, others]).clamp(min=1e-12)  # [E - kept]
            for cluster in range(int(found.max()) + 1):
                shares = torch.zeros(len(experts), dtype=torch.float64)
                shares[others] = weights * (found == cluster)
                merged = mean_of(experts, shares / shares.sum())
                for each in shares.nonzero().squeeze(1).tolist():
                    made[each] = merged
        return NewLayer(made, one_hot(range(len(experts)), len(experts)))


@dataclass(frozen=True)
class OwnWidths:
    """Every expert keeps its channels above one threshold of `scores` [L, E, F], so many that the share `keep` of all
    is left: over all layers, or where scores do not compare those, in each layer (`across`).
    """

    scores: F64
    keep: float
    across: bool
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    @property
    def kept(self) -> int:
        return int(self.scores.shape[1])

    @property
    def width(self) -> int:
        return int(self.scores.shape[2])

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        return _without(self.chosen()[layer], experts)

    def chosen(self) -> Bools:
        """Which channels stay, bool [L, E, F]; among equals those of the lower layer, expert and number."""
        groups = 1 if self.across else len(self.scores)
        flat = self.scores.reshape(groups, -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, : round(self.keep * flat.shape[1])]
        stays = np.zeros(flat.shape, np.bool_)
        np.put_along_axis(stays, best, values=True, axis=1)
        return stays.reshape(self.scores.shape)


@dataclass(frozen=True)
class OwnStrips:
    """Every expert's channels, the best first, are cut into `cut` equal strips, of which it keeps as many from the
    front as they are worth: strips compete as channels do in `OwnWidths`. The router is to be limited to `selection`,
    the experts that have a strip; a layer has at least `top_k` of those, by their first strips. A packed model in
    strips (profiler/pack_recipes.py) has one order for all tasks; this is what each task's own order would give.
    """

    scores: F64  # [L, E, F]
    keep: float
    across: bool
    cut: int
    top_k: int
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    @property
    def kept(self) -> int:
        return int(self.scores.shape[1])

    @property
    def width(self) -> int:
        return int(self.scores.shape[2])

    @property
    def selection(self) -> Selection:
        return Selection.of([np.flatnonzero(counts).tolist() for counts in self.counts()])

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        return _without(self.chosen()[layer], experts)

    def chosen(self) -> Bools:
        """Which channels stay, bool [L, E, F]."""
        rank = np.argsort(np.argsort(-self.scores, axis=2, kind="stable"), axis=2)  # of each channel in its expert
        stays: Bools = rank < self.counts()[:, :, None] * (self.width // self.cut)
        return stays

    def counts(self) -> npt.NDArray[np.int64]:
        """How many strips of each expert stay, [L, E]. Raises BudgetError where they are too few for one token."""
        layers, experts, width = self.scores.shape
        budget = round(self.keep * layers * experts * self.cut)
        if budget < layers * self.top_k:
            raise BudgetError(
                f"{budget} strips were asked for; {layers} layers need {layers * self.top_k} of them, a first strip of "
                f"{self.top_k} experts each. Keep more."
            )
        worth = np.maximum(-np.sort(-self.scores, axis=2), 0.0)  # HEAPr says -1 where it knows nothing
        worth = worth.reshape(layers, experts, self.cut, width // self.cut).sum(axis=3)  # [L, E, P] falling in P
        if not self.across:
            worth = worth / np.maximum(worth.sum(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
        first = np.argsort(-worth[:, :, 0], axis=1, kind="stable")[:, : self.top_k]
        np.put_along_axis(worth[:, :, 0], first, np.inf, axis=1)
        best = np.argsort(-worth.reshape(-1), kind="stable")[:budget]
        return np.bincount(best // self.cut, minlength=layers * experts).reshape(layers, experts)


def _without(stays: Bools, experts: Sequence[Expert]) -> NewLayer:
    """The experts without their channels outside `stays` [E, F]."""
    made = [
        Expert(each.inputs, each.input_biases, each.down * torch.from_numpy(kept)[:, None], each.down_bias)
        for each, kept in zip(experts, stays, strict=True)
    ]
    return NewLayer(made, one_hot(range(len(experts)), len(experts)))
