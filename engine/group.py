"""Rows in lockstep: they end at the same column of one window of the KV cache, and go through the model together.

Knows the model's call, the cache and the rows, not who joins when. B rows, S columns so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.arrivals import Interrupted
from engine.requests import Event, FailedEvent, Reason
from engine.routing import Routing
from engine.row import Paging, Row
from store.errors import MoepagerError
from store.records import Selection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.kvcache import KvCache


class Group:
    """Rows that decode. `mask` i64 [B, S] has a 0 where a row is padded: on its left and, while it stands still, on its
    right."""

    def __init__(self, engine: Engine, rows: Sequence[Row], cache: KvCache) -> None:
        self.rows = list(rows)
        self.cache = cache
        self.mask = torch.zeros(len(rows), 0, dtype=torch.long, device=engine.device)  # [B, S]
        self.routing = Routing(engine.board, self._selections(), engine.device)
        self._engine = engine
        self._standing: frozenset[Row] = frozenset()  # in the last pass

    @property
    def exact(self) -> list[Row]:
        """The rows that page experts in while they run."""
        return [row for row in self.rows if row.request.mode == "exact"]

    def decode(self, standing: Collection[Row] = ()) -> Tensor:
        """Send each row's newest token through. Logits [B, V]. An error leaves the group as it was.

        Rows that are `standing` wait: padding goes through in their place, and their logits mean nothing.
        """
        if not standing:
            self._catch_up()
        self._make_room()
        tokens = torch.tensor([[row.last] for row in self.rows], device=self.mask.device)  # [B, 1]
        moving = torch.tensor([[row not in standing] for row in self.rows], device=self.mask.device)  # [B, 1]
        mask = torch.cat([self.mask, moving.to(self.mask)], 1)  # [B, S + 1]
        logits = self._forward(tokens, mask)
        self.mask, self._standing = mask, frozenset(standing)
        for row in standing:
            row.lag += 1
        return logits

    def take(self, logits: Tensor) -> tuple[list[Event | FailedEvent], list[int]]:
        """Sample a token a row from `logits` [B, V]: events, receipts of the rows that end, places of those that go on.

        Nobody has left yet: `keep` what goes on. Rows that their guard stops are escalated and go on elsewhere.
        """
        events: list[Event | FailedEvent] = []
        left: list[int] = []
        strayed = self._strayed()
        coverage: list[float] | None = self.coverage() if strayed else None
        likeliest = logits.float().max(-1)  # [B] twice; torch takes four times as long over bfloat16
        for place, (highest, best) in enumerate(zip(*(each.tolist() for each in likeliest), strict=True)):
            row = self.rows[place]
            if row in self._standing:
                left.append(place)
                continue
            if not isfinite(highest):  # of numbers that are none the first is the highest
                events.append(FailedEvent(row.number, row.no_numbers))
                continue
            if coverage and place in strayed:
                if row.may_read:
                    row.escalate(coverage[place])
                else:
                    events.append(FailedEvent(row.number, row.refusal))
                continue
            reason: Reason | None = "length"
            if row.request.sampling.max_tokens:  # else the prompt was only to be scored
                try:
                    token, score = row.sampler.choose(logits[place], best)
                except MoepagerError as error:  # its constraint has come to an end of its own; the others go on
                    events.append(FailedEvent(row.number, error))
                    continue
                event, reason = row.take(token, score)
                events.append(event)
            if reason is None:
                left.append(place)
            else:
                coverage = coverage or self.coverage()
                events.append(row.finished(reason, coverage[place]))
        return events, left

    def _strayed(self) -> set[int]:
        """Places of the rows that their guard stops."""
        if all(row.request.guard is None for row in self.rows):
            return set()
        levels = self.routing.levels()
        return {place for place, row in enumerate(self.rows) if row.strays(levels[place])}

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at `places` alone; the others' leases end. The last rows fill the gaps."""
        if len(places) == len(self.rows):
            return
        self._close_all_but(places)
        order = closed_ranks(places)
        self.rows = [self.rows[place] for place in order]
        self._go_on_with(order)

    def absorb(self, other: Group) -> None:
        """The rows of `other` go on here: its window lies further down, its rows have their first token."""
        if not other.rows:
            return
        if (wider := other.cache.length - self.cache.length) > 0:
            self._shift(-wider)
        padding = self.cache.length - other.cache.length
        self.mask = torch.cat([self.mask, torch.nn.functional.pad(other.mask, (padding, 0))])  # [B + B', S]
        self.cache.absorb(other.cache)
        self.rows += other.rows
        self.routing = Routing.joined((self.routing, other.routing), self._selections())
        self._narrow()

    def coverage(self) -> list[float]:
        """Of each row so far."""
        return self.routing.coverage()

    def _close_all_but(self, places: Sequence[int]) -> None:
        staying = frozenset(places)
        for place, row in enumerate(self.rows):
            if place not in staying:
                row.close()

    def _go_on_with(self, order: Sequence[int]) -> None:
        """What the model sees are those of its rows alone, in this order."""
        self.cache.keep(order)
        self.mask = self.mask[order]
        self.routing = self.routing.select(order, self._selections())
        self._narrow()

    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """`ids` [B, new] under `mask` [B, S + new] -> logits of the last column [B, V]. An error changes nothing."""
        length = self.cache.length
        try:
            with Paging(self._engine, self.rows):
                return self._engine.passes.step(ids, mask, self.cache, self.routing)
        except (MoepagerError, Interrupted):
            self.cache.rewind(length)
            raise

    def _make_room(self) -> None:
        """At the pool's end, drop the columns that are padding in all rows.

        There is one: every row's prompt and answer fit the context, and this row still has a token to send.
        """
        if self.cache.length == self._engine.kv.context:
            self._catch_up()
            self._shift(self._spare())
            assert self.cache.length < self._engine.kv.context

    def _catch_up(self) -> None:
        """Rows that stood still end where the others do again, padded on their left alone."""
        for place, row in enumerate(self.rows):
            if row.lag:
                self.cache.push(place, row.lag)
                self.mask[place] = self.mask[place].roll(row.lag)
                row.lag = 0

    def _narrow(self) -> None:
        """Columns that only the departed needed cost every row's attention: drop them once they are half of all."""
        if 2 * self._spare() > self.cache.length:
            self._shift(self._spare())

    def _spare(self) -> int:
        """How many columns are padding in all rows."""
        return self.cache.length - max((row.columns for row in self.rows), default=0)

    def _shift(self, by: int) -> None:
        """Move all rows `by` columns to the left, which is padding; a negative `by` pads them."""
        self.cache.shift(by)
        self.mask = self.mask[:, by:] if by >= 0 else torch.nn.functional.pad(self.mask, (-by, 0))

    def _selections(self) -> list[Selection | None]:
        """Of the model's rows."""
        return [row.request.selection for row in self.rows]


def closed_ranks(places: Sequence[int]) -> list[int]:
    """Which of `places`, in ascending order, is where once the last of them have filled the gaps between the others."""
    staying = frozenset(places)
    movers = [place for place in places if place >= len(places)]
    return [place if place in staying else movers.pop() for place in range(len(places))]
