"""Recipes that mix experts: neurons of dropped experts recombined into the kept ones (DERN), and means of alike ones
(Sub-MoE). Both need a whole layer's experts in memory. E experts before, E' after, F channels, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.channels import Expert
from profiler.pack_clusters import plus_plus, spherical_k_means
from profiler.pack_recipes import NewLayer, one_hot
from store.records import F64

LIKE = 0.6  # DERN's best threshold of cosine: below it a dropped neuron is lost
CHUNK = 4096  # neurons compared at once


@dataclass(frozen=True)
class Recombined:
    """DERN (arXiv 2509.10377): the experts with most router weight stay; every neuron of the others goes to the kept
    expert that has the one most like it, and the kept expert's neurons are clustered anew into F.

    Neurons are compared part by part (gate, up, down each of length 1), since scaling one part against another leaves
    the function as it is. Ours, where the source was not at hand: clusters begin at the expert's own neurons, so that
    one that receives nothing stays as it is, and mixed router rows are divided by their weights, so that logits keep
    their size.
    """

    importance: F64  # [L, E]
    kept: int
    width: int
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        weights = torch.from_numpy(self.importance[layer])  # [E]
        ids = sorted(np.argsort(-self.importance[layer], kind="stable")[: self.kept].tolist())
        dropped = [each for each in range(len(experts)) if each not in ids]
        rows = one_hot(ids, len(experts))  # [E', E]
        received: list[list[tuple[int, Tensor]]] = [[] for _ in ids]
        home = torch.cat([_directions(experts[each]) for each in ids])  # [E' F, D]
        for each in dropped:
            to = _destinations(_directions(experts[each]), home, experts[each].width)  # [F], -1 for none
            for place in range(len(ids)):
                if len(moved := (to == place).nonzero().squeeze(1)):
                    received[place].append((each, moved))
                    rows[place, each] = len(moved) / experts[each].width
        rows = rows / rows.sum(dim=1, keepdim=True)
        made = [_recombine(experts, each, came, weights) for each, came in zip(ids, received, strict=True)]
        return NewLayer(made, rows)


def _directions(expert: Expert) -> Tensor:
    """Every neuron as one vector of length 1, its parts each of the same length: f32 [F, D]."""
    parts = [torch.nn.functional.normalize(part.float(), dim=1) for part in (*expert.inputs, expert.down)]
    directions: Tensor = torch.cat(parts, dim=1) / len(parts) ** 0.5
    return directions


def _destinations(neurons: Tensor, home: Tensor, width: int) -> Tensor:
    """Which kept expert has the neuron most like each of `neurons` [F, D]; -1 where none is like it. i64 [F]"""
    best = [(part @ home.T).max(dim=1) for part in torch.split(neurons, CHUNK)]
    values, index = (torch.cat(each) for each in zip(*best, strict=True))
    return torch.where(values > LIKE, index // width, -1)


def _recombine(
    experts: Sequence[Expert], number: int, came: Sequence[tuple[int, Tensor]], importance: Tensor
) -> Expert:
    own = experts[number]
    if not came:
        return own
    members = [own, *(experts[each].take(moved) for each, moved in came)]
    sizes = torch.tensor([len(each.down) for each in members])
    weights = importance[[number, *(each for each, _ in came)]].clamp(min=1e-12).repeat_interleave(sizes)  # [n]
    points = torch.cat([_directions(each) for each in members])  # [n, D]
    cluster = spherical_k_means(points, weights.float(), points[: own.width])  # [n]
    share = weights / torch.zeros(own.width, dtype=torch.float64).index_add_(0, cluster, weights)[cluster]  # [n]

    def mean(parts: Sequence[Tensor], before: Tensor) -> Tensor:
        """The members' directions, averaged, at their mean length; a cluster without members stays as it was."""
        rows = torch.cat(list(parts)).double()  # [n, ...]
        flat = rows.reshape(len(rows), -1)  # [n, D]
        lengths = flat.norm(dim=1) if rows.dim() > 1 else torch.ones(len(rows), dtype=torch.float64)  # [n]
        unit = flat / lengths.clamp(min=1e-30)[:, None]
        direction = torch.zeros(own.width, flat.shape[1], dtype=torch.float64).index_add_(
            0, cluster, share[:, None] * unit
        )
        length = torch.zeros(own.width, dtype=torch.float64).index_add_(0, cluster, share * lengths)  # [F]
        whole = (direction * length[:, None]).reshape(before.shape)
        empty = torch.bincount(cluster, minlength=own.width) == 0
        return torch.where(empty.reshape(-1, *[1] * (before.dim() - 1)), before.double(), whole).to(before.dtype)

    inputs = tuple(mean([each.inputs[at] for each in members], before) for at, before in enumerate(own.inputs))
    biases = tuple(mean([e.input_biases[at] for e in members], before) for at, before in enumerate(own.input_biases))
    return Expert(inputs, biases, mean([each.down for each in members], own.down), own.down_bias)


Outputs = Callable[[int], Tensor]  # of a layer: [m, E, H], every expert's of the same m tokens


@dataclass(frozen=True)
class ClusterMeans:
    """Sub-MoE (arXiv 2506.23266): experts whose outputs point the same way become one, their weights' mean by how often
    each was chosen. Its joint SVD without truncation is exactly that mean.

    The router's row of a merged expert is the same mean of its members' rows (ours: the source's was not at hand).
    Every layer has the same number of clusters, where the source shares them out between neighbouring layers.
    """

    outputs: Outputs
    frequency: F64  # [L, E]
    kept: int
    width: int
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        found = clusters(self.outputs(layer), self.kept)  # [E]
        weights = torch.from_numpy(self.frequency[layer]).clamp(min=1e-12)  # [E]
        rows = torch.zeros(self.kept, len(experts), dtype=torch.float64)
        rows[found, torch.arange(len(experts))] = weights
        rows = rows / rows.sum(dim=1, keepdim=True)  # [E', E]
        return NewLayer([mean_of(experts, row) for row in rows], rows)


def clusters(outputs: Tensor, count: int) -> Tensor:
    """`outputs` [m, E, H] -> the cluster of each expert, i64 [E], `count` of them and none empty.

    Likeness is the mean cosine of two experts' outputs over the tokens, that is the cosine of the outputs laid end to
    end, each token's of length 1.
    """
    directions = torch.nn.functional.normalize(outputs.float(), dim=2)  # [m, E, H]
    points = torch.nn.functional.normalize(directions.transpose(0, 1).flatten(1), dim=1)  # [E, m H]
    found = spherical_k_means(points, torch.ones(len(points)), plus_plus(points, count))
    for lacking in sorted(set(range(count)) - set(found.tolist())):  # the one least like its own cluster goes there
        sizes = torch.bincount(found, minlength=count)
        centres = torch.zeros(count, points.shape[1]).index_add_(0, found, points)
        likeness = (points * torch.nn.functional.normalize(centres, dim=1)[found]).sum(dim=1)
        found[int(likeness.masked_fill(sizes[found] == 1, torch.inf).argmin())] = lacking
    return found


def mean_of(experts: Sequence[Expert], shares: Tensor) -> Expert:
    """The experts' weights, averaged by `shares` f64 [E], which sum up to 1; an expert alone stays bit for bit."""
    members: list[int] = shares.nonzero().squeeze(1).tolist()
    first = experts[members[0]]
    if len(members) == 1:
        return first

    def mean(parts: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([part.double() for part in parts])  # [members, ...]
        return torch.einsum("n,n...->...", shares[members], stacked).to(parts[0].dtype)

    chosen = [experts[each] for each in members]
    inputs = tuple(mean([each.inputs[at] for each in chosen]) for at in range(len(first.inputs)))
    biases = tuple(mean([each.input_biases[at] for each in chosen]) for at in range(len(first.input_biases)))
    behind = [each.down_bias for each in chosen if each.down_bias is not None]
    return Expert(inputs, biases, mean([each.down for each in chosen]), mean(behind) if behind else None)
