"""Routing of a batch: each row inside its own selection, coverage metered, observers told. Knows no bytes and no slots.

L MoE layers, E experts a layer, B rows, S positions, T = B*S tokens row-major, k experts a token, G selections a batch.
Routers choose experts; selections and whoever computes know P strips of each (engine/strips.py), where P is mostly 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from engine.choice import Choice
from engine.guard import NEWEST
from engine.layer_shape import FREE, Limits
from engine.observer import Observer
from engine.restriction import Restriction, Routed
from engine.row_limits import RowLimits
from engine.strips import Listed
from engine.switchboard import Switchboard
from store.records import Selection

WAITING = 32  # passes of single tokens whose coverage is computed together


class Routing:
    """One batch. `begin` before each pass of the model, `finish` after it. A selection None routes freely."""

    def __init__(self, board: Switchboard, selections: Sequence[Selection | None], device: torch.device) -> None:
        self._board = board
        self._device = device
        self._rows = len(selections)
        self._limits = RowLimits.of(board, selections, device)
        self._groups = self._limits.groups
        self._limited = self._limits.inside is not None
        self._inside_sum = torch.zeros(self._rows, dtype=torch.float64, device=device)
        self._tokens_seen = torch.zeros(self._rows, dtype=torch.float64, device=device)
        self._level = torch.ones(self._rows, dtype=torch.float64, device=device)
        self._maskable = self._limits.forbidden is not None or self._limits.one_mask
        self._row_of: Tensor | None = None  # [T, 1] of the pass, where strips are held
        self._valid: Tensor | None = None
        self._free: Tensor | slice | None = None
        self._width = 0
        self._seen: list[tuple[Tensor, Tensor]] = []  # of the pass: weights and index [T, k], one a layer
        self._unmetered: list[tuple[Tensor, Tensor]] = []  # of passes before it, all of one column
        self.observer: Observer | None = None

    def begin(self, width: int, valid: Tensor | None = None) -> None:
        """A pass over [B, `width`] tokens; `valid` bool [B, width] marks what is not padding, None: nothing is."""
        padded = None if valid is None or bool(valid.all()) else valid.reshape(-1)  # [T]
        if width > 1 or padded is not None:
            self._meter()
        self._width, self._valid = width, padded
        self._seen.clear()
        if len(self._groups) > 1 and (not self._limits.together or self._board.lookahead is not None):
            self._place_groups(width)
        if self._limits.held is not None:
            self._row_of = torch.arange(self._rows, device=self._device).repeat_interleave(width).unsqueeze(1)  # [T, 1]
        self._free = None if self._board.lookahead is None else self._free_tokens()
        self._board.routing = self

    def _place_groups(self, width: int) -> None:
        places = torch.arange(self._rows * width, device=self._device).view(self._rows, width)  # [B, S]
        for group in self._groups:
            group.tokens = places[group.rows].flatten()

    def _free_tokens(self) -> Tensor | slice | None:
        """Which of the pass's T tokens are routed freely and no padding; None: none of them."""
        group = next((group for group in self._groups if group.restrictions is None), None)
        if group is None:
            return None
        if self._valid is None:
            return slice(None) if group.tokens is None else group.tokens
        return self._valid if group.tokens is None else group.tokens[self._valid[group.tokens]]

    @property
    def single(self) -> bool:
        """Whether this pass is one new token a row, none of them padding, and nobody watches."""
        return self._width == 1 and self._valid is None and self.observer is None

    @property
    def steps(self) -> bool:
        """Whether a layer's call may route this pass by `limits`: a single one in which nobody looks ahead, either."""
        return self.single and self._maskable and self._board.lookahead is None

    @property
    def unwatched(self) -> bool:
        """Whether nobody looks at this pass, of however many tokens a row."""
        return self.observer is None and self._board.lookahead is None

    @property
    def chooses(self) -> bool:
        """Whether a layer's call may route an unwatched pass of many tokens a row by `limits`."""
        return self._maskable and self._board.strips.count == 1

    @property
    def valid(self) -> Tensor | None:
        """Which tokens of this pass are no padding, bool [T]; None: all."""
        return self._valid

    @property
    def replaces(self) -> bool:
        """Whether something stands in for experts that are left out, of any row."""
        return self._limits.replaces

    def limits(self, layer: int, choice: Choice) -> Limits:
        """Of a pass that `steps` or `chooses`, layer after layer. What is filled in there is metered once the pass has
        ended."""
        if not self._limited:
            return FREE
        tokens = self._rows * self._width
        weights = torch.empty(tokens, choice.top_k, dtype=choice.dtype)  # [T, k]
        index = torch.empty(tokens, choice.top_k, dtype=torch.long)  # [T, k]
        self._seen.append((weights, index))
        calls = None if self._limits.calls is None else self._limits.calls[layer]  # [B]
        if self._limits.forbidden is not None:
            return Limits(self._limits.forbidden[:, layer], weights, index, calls)
        restrictions = self._groups[0].restrictions
        assert restrictions is not None
        limit = restrictions[layer]
        assert isinstance(limit, Restriction)
        return Limits(limit.forbidden, weights, index, calls)

    def finish(self) -> None:
        """End the pass and add its coverage to the rows'; single tokens wait until it is asked for, for many together
        cost little more than one."""
        self._unplug()
        if not self._limited:
            return
        self._unmetered.extend(self._seen)
        self._seen.clear()
        if self._width > 1 or self._valid is not None or len(self._unmetered) >= WAITING * self._board.layers:
            self._meter()

    def _meter(self) -> None:
        """Coverage of what waits for it: one pass over many columns, or some over one."""
        if not self._unmetered:
            return
        passes = len(self._unmetered) // self._board.layers
        stacked = (torch.stack(each) for each in zip(*self._unmetered, strict=True))  # [P*L, T, k] each
        seen = [each.view(passes, -1, *each.shape[1:]) for each in stacked]
        self._unmetered.clear()
        weights, index = (each.transpose(0, 1).flatten(1, 2) for each in seen)  # [L, P*T, k]
        inside = self._inside_of(index, passes)  # [L, P*T, k]
        share = (weights * inside).sum(-1) / weights.sum(-1)  # [L, P*T]
        share = share.nan_to_num(nan=0.0)  # a router that says no number is not inside: the guard has to hear of it
        kept = share.mean(0).double().view(passes, self._rows, -1).transpose(0, 1).flatten(1)  # [B, P*S]
        valid = None if self._valid is None else self._valid.view(self._rows, -1)
        self._move_levels(kept, valid)
        if valid is None:
            self._inside_sum += kept.sum(1)
            self._tokens_seen += kept.shape[1]
        else:
            self._inside_sum += kept.where(valid, 0).sum(1)
            self._tokens_seen += valid.sum(1)

    def _move_levels(self, kept: Tensor, valid: Tensor | None) -> None:
        """`kept` [B, S] of one token after the other moves the rows' levels; the first token of all sets them."""
        if valid is None and kept.shape[1] == 1:
            first = kept[:, 0]  # [B]
            moved = torch.lerp(self._level, first, NEWEST)  # [B]
            self._level = torch.where(self._tokens_seen > 0, moved, first)
            return
        counted = torch.ones_like(kept) if valid is None else valid.to(kept)  # [B, S]
        later = counted.flip(1).cumsum(1).flip(1) - counted  # [B, S] tokens of the row that come after
        weights = NEWEST * (1 - NEWEST) ** later * counted  # [B, S]
        first = kept.gather(1, counted.argmax(1, keepdim=True)).squeeze(1)  # [B]
        start = torch.where(self._tokens_seen > 0, self._level, first)  # [B]
        self._level = start * (1 - NEWEST) ** counted.sum(1) + (weights * kept).sum(1)

    def abort(self) -> None:
        """The pass failed: unplug, meter nothing."""
        self._unplug()
        self._seen.clear()

    def _unplug(self) -> None:
        self._board.routing = None
        self._board.added.clear()
        if self._board.lookahead is not None:
            self._board.lookahead.end()

    def coverage(self) -> list[float]:
        """For each row, the mean share of the unrestricted router's weight that lay inside the row's selection."""
        if not self._limited:
            return [1.0] * self._rows
        self._meter()
        return (self._inside_sum / self._tokens_seen.clamp(min=1)).where(self._tokens_seen > 0, 1.0).tolist()

    def levels(self) -> list[float]:
        """For each row, coverage as the guard sees it: a mean that forgets (engine/guard.py)."""
        self._meter()
        return self._level.tolist()

    def select(self, rows: Sequence[int], selections: Sequence[Selection | None]) -> Routing:
        """The batch with only `rows` left, of these selections, coverage carried along."""
        self._meter()
        left = Routing(self._board, selections, self._device)
        left._inside_sum = self._inside_sum[list(rows)]
        left._tokens_seen = self._tokens_seen[list(rows)]
        left._level = self._level[list(rows)]
        return left

    @classmethod
    def joined(cls, parts: Sequence[Routing], selections: Sequence[Selection | None]) -> Routing:
        """Batches that go on as one, of these selections in the order of the parts, coverage carried along."""
        for part in parts:
            part._meter()
        whole = cls(parts[0]._board, selections, parts[0]._device)
        whole._inside_sum = torch.cat([part._inside_sum for part in parts])
        whole._tokens_seen = torch.cat([part._tokens_seen for part in parts])
        whole._level = torch.cat([part._level for part in parts])
        return whole

    def route(self, layer: int, x: Tensor, routed: Routed) -> Routed:
        """`x` [T, H] and what the unrestricted router said of it -> what the experts get, [T, E*P] and twice [T, k*P].
        Padding's index is E*P."""
        logits, weights, index = routed
        if self._limited:
            self._seen.append((weights, index))
            weights, index = self._restricted(layer, x, routed)
        if self._board.strips.count > 1:
            logits = logits.repeat_interleave(self._board.strips.count, 1)  # [T, E*P]
            weights, index = self.in_strips(layer, weights, index)
        if self._board.lookahead is not None and self._free is not None:
            self._board.lookahead.look(layer, x[self._free])
        if self.observer is not None:
            valid = torch.ones(len(x), dtype=torch.bool, device=x.device) if self._valid is None else self._valid
            self.observer.routed(layer, x, logits, weights, index, valid)
        if self._valid is not None:
            index = index.masked_fill(~self._valid.unsqueeze(1), self._board.strips.total)  # [T, k]
        return logits, weights, index

    def in_strips(self, layer: int, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of each token's experts, [T, k], those strips that its own row holds: [T, k*P], none being E*P."""
        weights, index = self._board.strips.spread(weights, index)
        if self._limits.held is not None:
            held = self._limits.held[self._row_of, layer, index]  # [T, k*P]
            index = index.masked_fill(~held, self._board.strips.total)
        return weights, index

    def strips_of(self, layer: int, chosen: Sequence[int]) -> list[int]:
        """The same of a token a row, in plain numbers, B*k -> B*k*P: tensors take longer than so few products."""
        calls, found = len(chosen) // self._rows, list[int]()
        for row, layers in enumerate(self._strips):
            held = layers[layer]
            for expert in chosen[row * calls : (row + 1) * calls]:
                found += held[expert]
        return found

    @cached_property
    def _strips(self) -> list[list[Listed]]:
        return self._limits.listed(self._board)

    def _restricted(self, layer: int, x: Tensor, routed: Routed) -> tuple[Tensor, Tensor]:
        logits, weights, index = routed
        if len(self._groups) == 1:
            restrictions = self._groups[0].restrictions
            assert restrictions is not None
            limit = restrictions[layer]
            if isinstance(limit, Restriction):
                return limit.route(x, logits)
            weights, index, self._board.added[layer] = limit.apply(x, routed)
            return weights, index
        if self._limits.forbidden is not None and self._limits.together:
            forbidden = self._limits.forbidden[:, layer]  # [B, E]
            tokens = forbidden if self._width == 1 else forbidden.repeat_interleave(self._width, 0)  # [T, E]
            return self._board.masked[layer](logits, tokens)
        weights, index = weights.clone(), index.clone()
        for group in self._groups:
            if group.restrictions is None or group.tokens is None:
                continue
            limit, tokens = group.restrictions[layer], group.tokens
            if isinstance(limit, Restriction):
                own = limit.route(x[tokens], logits[tokens])
                weights.index_copy_(0, tokens, own[0].to(weights.dtype))
                index.index_copy_(0, tokens, own[1])
            else:
                *chosen, added = limit.apply(x[tokens], (logits[tokens], weights[tokens], index[tokens]))
                weights.index_copy_(0, tokens, chosen[0].to(weights.dtype))
                index.index_copy_(0, tokens, chosen[1])
                whole = self._board.added.setdefault(layer, added.new_zeros(len(x), added.shape[1]))  # [T, H]
                whole.index_copy_(0, tokens, added)
        return weights, index

    def _inside_of(self, index: Tensor, passes: int) -> Tensor:
        """`index` [L, P*T, k] -> [L, P*T, k]: how much of each choice lies inside its own row's selection."""
        inside = self._limits.inside
        assert inside is not None
        layer = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1)
        if self._rows == 1:
            return inside[0][layer, index]
        row = torch.arange(self._rows, device=index.device).repeat_interleave(self._width).repeat(passes).view(1, -1, 1)
        return inside[row, layer, index]
