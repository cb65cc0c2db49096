"""Recipes that leave a checkpoint's shape as it is and change weights in it, to measure what no checkpoint can say.

An expert whose weights were replaced is asked for like any other, by the free router: that is what a stand-in means.
Its bytes are counted by whoever compares, since the file has all of them. E experts, F channels, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from engine.channels import Expert
from profiler.pack_mixtures import Outputs, clusters, mean_of
from profiler.pack_recipes import NewLayer, one_hot
from store.records import F64, Selection


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

    @property
    def kept(self) -> int:
        return int(self.scores.shape[1])

    @property
    def width(self) -> int:
        return int(self.scores.shape[2])

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        stays = torch.from_numpy(self.chosen()[layer])  # [E, F]
        made = [
            Expert(each.inputs, each.input_biases, each.down * stays[number, :, None], each.down_bias)
            for number, each in enumerate(experts)
        ]
        return NewLayer(made, one_hot(range(len(experts)), len(experts)))

    def chosen(self) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        """Which channels stay, bool [L, E, F]; among equals those of the lower layer, expert and number."""
        groups = 1 if self.across else len(self.scores)
        flat = self.scores.reshape(groups, -1)
        best = np.argsort(-flat, axis=1, kind="stable")[:, : round(self.keep * flat.shape[1])]
        stays = np.zeros(flat.shape, np.bool_)
        np.put_along_axis(stays, best, values=True, axis=1)
        return stays.reshape(self.scores.shape)
