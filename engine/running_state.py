"""The running states of a decoder layer: of a convolution, of linear attention, of a state space.

They keep their size whatever a row has been through, so that nothing of them can be masked afterwards: what they have
taken in stays. Hence a pass works on copies, which are the rows' own once it got through (`settle`) and are dropped
where it did not (`forget`); a row whose last column is padding keeps what it had. B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from engine.cache_shape import Kind
from engine.window import Window

# Of each state what all rows have, and as much memory for what a pass makes of it: twice [max B, ...].
States = Mapping[tuple[Kind, int], tuple[Tensor, Tensor]]


class RunningLayer(Window, LinearAttentionCacheLayerMixin):  # type: ignore[misc]
    """One layer's states in a window of the pool: the rows from `first` on, which have been through nothing yet."""

    def __init__(self, states: States, first: int, rows: int) -> None:
        self._states = states
        self._new: dict[tuple[Kind, int], Tensor] = {}  # [B, ...], of the pass that runs
        self._begun = False  # whether a pass got through
        self.record_past = False
        self.number_of_states = 1 + max(at for _, at in states)
        self.first, self.batch_size = first, rows
        for held, _ in states.values():
            held[first : first + rows].zero_()

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Everything is there since open."""

    @property
    def has_previous_state(self) -> Mapping[int, bool]:
        """Whether there is something to go on from: what the model asks first."""
        return {at: self._begun or any(key[1] == at for key in self._new) for at in range(self.number_of_states)}

    def read(self, kind: Kind, at: int) -> Tensor:
        """[B, ...], a copy, which the model may write into: it is what `settle` keeps."""
        if (kind, at) not in self._new:
            held, _ = self._rows(kind, at)
            self._keep(kind, at, held)
        return self._new[kind, at]

    def held(self) -> list[Tensor]:
        """Copies of what the rows have, [B, ...] each."""
        return [self._rows(*key)[0].clone() for key in self._states]

    def _rows(self, kind: Kind, at: int) -> tuple[Tensor, Tensor]:
        """What the rows have, and the memory for what becomes of it, [B, ...] each."""
        held, spare = self._states[kind, at]
        rows = slice(self.first, self.first + self.batch_size)
        return held[rows], spare[rows]

    def _keep(self, kind: Kind, at: int, state: Tensor) -> None:
        """A copy of `state` is what the pass leaves, unless it changes it."""
        _, spare = self._rows(kind, at)
        self._new[kind, at] = spare.copy_(state)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """`conv_states` [B, W, new], of the new tokens -> with what the convolution still sees before them."""
        kept, new = self._states["conv", state_idx][0].shape[-1], conv_states.shape[-1]
        begun = self.has_previous_state[state_idx]
        before = kept if begun else max(0, kept - new)
        rows, width = conv_states.shape[:2]
        # A token's channels lie beside each other, as they come.
        seen = conv_states.new_zeros(rows, before + new, width).transpose(1, 2)  # [B, W, before + new]
        if begun:
            seen[..., :before] = self.read("conv", state_idx)
        seen[..., before:] = conv_states
        self._keep("conv", state_idx, seen[..., -kept:])
        return seen

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """`recurrent_states` [B, ...] as the pass leaves them."""
        self._new["recurrent", state_idx] = recurrent_states
        return recurrent_states

    def settle(self, moved: Tensor | None) -> None:
        """What the pass left is what the rows have from now on: those of `moved` bool [B], None for all."""
        for key, new in self._new.items():
            rows, _ = self._rows(*key)
            rows.copy_(new if moved is None else torch.where(moved.view(-1, *[1] * (new.dim() - 1)), new, rows))
        self._new.clear()
        self._begun = True

    def forget(self) -> None:
        """The pass failed half-way: the rows have what they had."""
        self._new.clear()

    def absorb(self, other: Window) -> None:
        assert isinstance(other, RunningLayer), type(other)
        super().absorb(other)
        self._begun = self._begun or other._begun

    def _bring(self, source: Window, row: int, place: int) -> None:
        """Both are windows of one pool."""
        for held, _ in self._states.values():
            held[self.first + place].copy_(held[source.first + row])
