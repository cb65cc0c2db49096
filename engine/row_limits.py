"""What each row of a batch may be routed to, for the batch as a whole: tables, and rows of one selection together.

L MoE layers, E experts a layer, P strips of each (engine/strips.py; mostly 1), B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.restriction import Restriction
from engine.stand_ins import Replacement
from engine.strips import Listed
from store.records import Selection

if TYPE_CHECKING:
    from engine.switchboard import Switchboard

Restrictions = tuple[Restriction | Replacement, ...]  # one a layer


@dataclass(slots=True)
class Group:
    """Rows of the batch with the same selection. `tokens` [n] is None where the group is the whole batch."""

    rows: list[int]
    selection: Selection | None
    restrictions: Restrictions | None
    tokens: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RowLimits:
    """`inside` bool [B, L, E]: each row's experts, None where all rows route freely; with strips f32, how much of each
    is there. `forbidden` bool [B, L, E], the others, where rows differ and the logits alone decide for all of them.
    `calls` i64 [L, B]: how many experts a row is routed to, None where that is the model's own number everywhere.
    `held` bool [B, L, E*P + 1]: each row's strips, None where there are none; what is nobody's stays nobody's.
    """

    groups: list[Group]
    inside: Tensor | None
    forbidden: Tensor | None
    calls: Tensor | None
    held: Tensor | None

    @classmethod
    def of(cls, board: Switchboard, selections: Sequence[Selection | None], device: torch.device) -> RowLimits:
        groups = _grouped(board, selections)
        if all(group.restrictions is None for group in groups):
            return cls(groups, None, None, None, None)
        rows, kind = len(selections), torch.bool if board.strips.count == 1 else torch.float32
        inside = torch.ones(rows, board.layers, board.experts, dtype=kind, device=device)
        for group in groups:
            if group.restrictions is not None:
                inside[group.rows] = torch.stack([limit.inside for limit in group.restrictions])
        alike = all(isinstance(limit[0], Restriction) for limit in _limits(groups))
        forbidden = inside == 0 if board.masked and alike and len(groups) > 1 else None
        calls, held = (table(board, groups, rows, device) for table in (_calls, _held))
        return cls(groups, inside, forbidden, calls, held)

    def listed(self, board: Switchboard) -> list[list[Listed]]:
        """Of each row and layer, the strips that it holds by expert."""
        rows: dict[int, list[Listed]] = {}
        for group in self.groups:
            limits = [limit.listed for limit in group.restrictions or () if isinstance(limit, Restriction)]
            mine = [limit for limit in limits if limit is not None] or [board.strips.listed()] * board.layers
            rows |= dict.fromkeys(group.rows, mine)
        return [rows[row] for row in range(len(rows))]

    @property
    def one_mask(self) -> bool:
        """Whether one mask of the logits holds for all rows, or none has to."""
        limits = _limits(self.groups)
        one = not limits or (isinstance(limits[0][0], Restriction) and limits[0][0].forbidden is not None)
        return len(self.groups) == 1 and one

    @property
    def replaces(self) -> bool:
        """Whether any row has stand-ins."""
        return any(isinstance(limit[0], Replacement) for limit in _limits(self.groups))

    @property
    def together(self) -> bool:
        """Whether one call of a router serves all rows, whatever their limits."""
        return self.forbidden is not None and self.calls is None


def _limits(groups: Sequence[Group]) -> list[Restrictions]:
    return [group.restrictions for group in groups if group.restrictions is not None]


def _calls(board: Switchboard, groups: Sequence[Group], rows: int, device: torch.device) -> Tensor | None:
    chosen = [(group.rows, None if group.selection is None else group.selection.calls) for group in groups]
    if all(calls is None for _, calls in chosen):
        return None
    table = torch.full((board.layers, rows), board.top_k, device=device)  # [L, B]
    for mine, calls in chosen:
        if calls is not None:
            table[:, mine] = torch.tensor(calls, device=device).unsqueeze(1)
    return table


def _held(board: Switchboard, groups: Sequence[Group], rows: int, device: torch.device) -> Tensor | None:
    total = board.strips.total
    if board.strips.count == 1:
        return None
    table = torch.ones(rows, board.layers, total + 1, dtype=torch.bool, device=device)
    for group in groups:
        for layer, limit in enumerate(group.restrictions or ()):
            assert isinstance(limit, Restriction)
            assert limit.held is not None
            table[group.rows, layer, :total] = limit.held.flatten()
    return table


def _grouped(board: Switchboard, selections: Sequence[Selection | None]) -> list[Group]:
    groups: dict[Selection | None, Group] = {}
    for row, selection in enumerate(selections):
        if selection is not None and selection not in groups:
            board.check_selection(selection)
        restrictions = None if selection is None else board.restrictions(selection)
        key = None if restrictions is None else selection
        groups.setdefault(key, Group([], key, restrictions)).rows.append(row)
    return list(groups.values())
