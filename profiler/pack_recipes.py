"""How a layer's experts become fewer or smaller ones: some of their channels, some of them, or mixtures of them.

A recipe gives for each layer its new experts, and how the new router's rows are made of the old ones. E experts before,
E' after, F channels before, F' after, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.channels import Expert
from store.errors import InvalidInput
from store.records import F64, Selection

STEP = 8  # channels: a multiple of this is a multiple of 16 bytes in every type of 16 bits or more


def rounded(width: int, keep: float) -> int:
    """How many channels a share means: the nearest multiple of STEP, at least one; all where there are no more."""
    if not 0 < keep <= 1:
        raise InvalidInput(f"A share of channels must lie in (0, 1], got {keep}.", param="channels")
    return width if keep == 1 else min(width, max(STEP, round(keep * width / STEP) * STEP))


@dataclass(frozen=True, slots=True)
class NewLayer:
    """`experts` E' of them; `rows` f64 [E', E]: the new router's rows as sums of the old ones."""

    experts: list[Expert]
    rows: Tensor


class Recipe(Protocol):
    """`kept` and `width` are E' and F', `strips` how many new experts each old one becomes; `said` goes on the card."""

    @property
    def kept(self) -> int: ...

    @property
    def strips(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def said(self) -> dict[str, Any]: ...

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer: ...


@dataclass(frozen=True)
class FewerChannels:
    """Each expert's best `width` channels by `scores` f64 [L, E, F]; of the experts, all or those of a selection.

    `means` f64 [L, E, F], mean h of every channel: what the lost channels give on the average goes into the bias behind
    the down projection, in families that have one.
    """

    scores: F64
    width: int
    selection: Selection
    means: F64 | None = None
    said: dict[str, Any] = field(default_factory=dict)
    strips: int = 1

    def __post_init__(self) -> None:
        whole = self.scores.shape[-1]
        if not 1 <= self.width <= whole or (self.width % STEP and self.width != whole):
            raise InvalidInput(
                f"An expert of {whole} channels keeps a multiple of {STEP} of them, or all: torch's grouped products "
                f"want rows of whole 16 bytes. Got {self.width}.",
                param="channels",
            )
        uniform_count(self.selection)

    @property
    def kept(self) -> int:
        return uniform_count(self.selection)

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        ids = self.selection.experts[layer]
        return NewLayer([self._expert(layer, each, experts[each]) for each in ids], one_hot(ids, len(experts)))

    def chosen(self, layer: int, expert: int) -> Tensor:
        """The channels that stay, i64 [F'], rising; among equals the lower one."""
        order = np.argsort(-self.scores[layer, expert], kind="stable")[: self.width]
        return torch.from_numpy(np.sort(order))

    def _expert(self, layer: int, number: int, expert: Expert) -> Expert:
        channels = self.chosen(layer, number).to(expert.down.device)
        sliced = expert.take(channels)
        if self.means is None:
            return sliced
        if expert.down_bias is None:
            raise InvalidInput(
                "This family's experts have no bias behind the down projection, so what lost channels give on the "
                "average has nowhere to go. Leave --compensate out.",
                param="compensate",
            )
        lost = torch.from_numpy(self.means[layer, number]).to(expert.down.device).index_fill(0, channels, 0)  # [F]
        bias = expert.down_bias.double() + lost @ expert.down.double()  # [H]
        return Expert(sliced.inputs, sliced.input_biases, sliced.down, bias.to(expert.down_bias.dtype))


@dataclass(frozen=True)
class InStrips:
    """All of the model, each expert cut into `strips` new ones of F / P channels, the best by `scores` f64 [L, E, F] in
    the first. A router that has each row P times gives a strip `share` of its expert's weight, so the down projection
    is divided by that (exactly, where P is a power of two); a bias behind it goes into the first strip.
    """

    scores: F64
    strips: int
    share: float
    said: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        whole, strips = self.scores.shape[-1], self.strips
        if strips < 2 or whole % (strips * STEP):
            known = [count for count in range(2, whole // STEP + 1) if whole % (count * STEP) == 0]
            raise InvalidInput(
                f"Experts of {whole} channels are cut into strips of equal numbers of channels, each a multiple of "
                f"{STEP}: {', '.join(map(str, known)) or 'none are possible'}. Got {strips}.",
                param="strips",
            )

    @property
    def kept(self) -> int:
        return int(self.scores.shape[1]) * self.strips

    @property
    def width(self) -> int:
        return int(self.scores.shape[2]) // self.strips

    def layer(self, layer: int, experts: Sequence[Expert]) -> NewLayer:
        made = [strip for number, expert in enumerate(experts) for strip in self._cut(layer, number, expert)]
        return NewLayer(made, one_hot([strip // self.strips for strip in range(self.kept)], len(experts)))

    def channels(self, layer: int, expert: int) -> Tensor:
        """The channels of each strip, i64 [P, F/P], rising; among equals the lower one comes first."""
        order = np.argsort(-self.scores[layer, expert], kind="stable").reshape(self.strips, self.width)
        return torch.from_numpy(np.sort(order, axis=1))

    def _cut(self, layer: int, number: int, expert: Expert) -> list[Expert]:
        strips = [expert.take(channels.to(expert.down.device)) for channels in self.channels(layer, number)]
        biases = [None if each.down_bias is None else each.down_bias * (at == 0) for at, each in enumerate(strips)]
        return [
            Expert(each.inputs, each.input_biases, each.down / self.share, None if bias is None else bias / self.share)
            for each, bias in zip(strips, biases, strict=True)
        ]


def uniform_count(selection: Selection) -> int:
    """Experts a layer; config.json has one number for all."""
    counts = {len(ids) for ids in selection.experts}
    if len(counts) != 1 or 0 in counts:
        raise InvalidInput(
            f"A packed model has the same number of experts in every layer, at least one; the selection has "
            f"{sorted(counts)}. Choose the allocator uniform.",
            param="allocator",
        )
    return counts.pop()


def one_hot(ids: Sequence[int], experts: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(list(ids)), experts).double()  # [E', E]
