"""How the channels of one expert lie in its parameters, for every family alike. Knows one expert, no bank and no text.

Channel c of F is what one inner number does: its rows of gate and up, its column of the down projection. An expert is
the sum of its channels, so taking some of them away is slicing three matrices. H hidden, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.layout import SlotLayout


@dataclass(frozen=True, slots=True)
class Expert:
    """One expert, channel by channel: `inputs` are gate and up (or up alone), `down` is transposed to have a row a
    channel.
    """

    inputs: tuple[Tensor, ...]  # [F, H] each
    input_biases: tuple[Tensor, ...]  # [F] each; none without biases
    down: Tensor  # [F, H]
    down_bias: Tensor | None  # [H]

    @property
    def width(self) -> int:
        return len(self.down)

    def take(self, channels: Tensor) -> Expert:
        """These channels alone, `channels` i64 [F'], in their order."""
        return self.map(lambda tensor: tensor.index_select(0, channels))

    def map(self, change: Callable[[Tensor], Tensor]) -> Expert:
        """`change` of everything that has a row for each channel; the bias behind the down projection stays."""
        inputs, biases = (tuple(change(each) for each in kind) for kind in (self.inputs, self.input_biases))
        return Expert(inputs, biases, change(self.down), self.down_bias)


@dataclass(frozen=True, slots=True)
class Channels:
    """The same for every expert of a model. `interleaved`: gate and up take turns, else one lies behind the other."""

    width: int  # F
    gated: bool
    biased: bool
    transposed: bool
    interleaved: bool

    @classmethod
    def of(cls, module: Any, layout: SlotLayout) -> Channels:
        """Read off the experts module and its layout."""
        down = next(parameter for parameter in layout.parameters if parameter.name == "down_proj")
        transposed, gated = bool(module.is_transposed), bool(module.has_gate)
        width = down.shape[0] if transposed else down.shape[1]
        interleaved = gated and _takes_turns(module._apply_gate, width)
        return cls(width, gated, bool(module.has_bias), transposed, interleaved)

    def split(self, views: Sequence[Tensor]) -> Expert:
        """An expert's parameters in the layout's order -> its channels. Views where that is possible."""
        into, down = views[0], views[2 if self.biased else 1]
        rows = into.T if self.transposed else into  # [2F, H]
        biases = self.parts(views[1]) if self.biased else ()
        return Expert(self.parts(rows), biases, down if self.transposed else down.T, views[3] if self.biased else None)

    def join(self, expert: Expert) -> tuple[Tensor, ...]:
        """The inverse of `split`, for any number of channels."""
        rows = self._whole(expert.inputs)  # [2F, H]
        into = (rows.T if self.transposed else rows).contiguous()
        down = (expert.down if self.transposed else expert.down.T).contiguous()
        if not self.biased:
            return into, down
        assert expert.down_bias is not None
        return into, self._whole(expert.input_biases), down, expert.down_bias

    def parts(self, both: Tensor) -> tuple[Tensor, ...]:
        """Gate and up out of what has both along its first dimension: [2F, ...] -> two of [F, ...]."""
        if not self.gated:
            return (both,)
        return (both[0::2], both[1::2]) if self.interleaved else (both[: len(both) // 2], both[len(both) // 2 :])

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        if not self.interleaved:
            return torch.cat(list(parts))
        return torch.stack(list(parts), dim=1).flatten(0, 1)


def _takes_turns(gate: Callable[[Tensor], Tensor], width: int) -> bool:
    """Whether entry 1 belongs to channel 0: found by moving it, since modules do not say."""
    if width == 1:
        return False
    base = torch.linspace(0.5, 1.5, 2 * width).unsqueeze(0)  # [1, 2F]
    moved = base.clone()
    moved[0, 1] += 0.5
    with torch.no_grad():
        return bool((gate(base) != gate(moved))[0, 0])
