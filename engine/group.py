"""Rows in lockstep: they end at the same column of one window of the KV cache, and go through the model together.

Knows the model's call, the cache and the rows, not who joins when. B rows, S columns so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.arrivals import Interrupted
from engine.requests import Event, FailedEvent, Reason, Score
from engine.routing import Routing
from engine.row import Paging, Row
from store.errors import MoepagerError
from store.records import Selection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.kvcache import KvCache

PAD = 0  # any token: padding is masked everywhere


class Group:
    """Rows that decode. `mask` i64 [B, S] has a 0 where a row is padded, always on its left."""

    def __init__(self, engine: Engine, rows: Sequence[Row], cache: KvCache) -> None:
        self.rows = list(rows)
        self.cache = cache
        self.mask = torch.zeros(len(rows), 0, dtype=torch.long, device=engine.device)  # [B, S]
        self.routing = Routing(engine.board, self._selections(), engine.device)
        self._engine = engine

    def decode(self) -> Tensor:
        """Send each row's newest token through. Logits [B, V]. An error leaves the group as it was."""
        self._make_room()
        tokens = torch.tensor([[row.last] for row in self.rows], device=self.mask.device)  # [B, 1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)  # [B, S + 1]
        logits = self._forward(tokens, mask)
        self.mask = mask
        return logits

    def take(self, logits: Tensor) -> tuple[list[Event | FailedEvent], list[int]]:
        """Sample a token a row from `logits` [B, V]: events, receipts of the rows that end, places of those that go on.

        Nobody has left yet: `keep` what goes on. Rows that their guard stops are escalated and go on elsewhere.
        """
        events: list[Event | FailedEvent] = []
        left: list[int] = []
        strayed = self._strayed()
        coverage: list[float] | None = self.routing.coverage() if strayed else None
        for place, best in enumerate(logits.argmax(-1).tolist()):
            row = self.rows[place]
            if coverage and place in strayed:
                row.escalate(coverage[place])
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
                coverage = coverage or self.routing.coverage()
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
        staying = frozenset(places)
        for place, row in enumerate(self.rows):
            if place not in staying:
                row.close()
        movers = [place for place in places if place >= len(places)]
        order = [place if place in staying else movers.pop() for place in range(len(places))]
        self.rows = [self.rows[place] for place in order]
        self.cache.keep(order)
        self.mask = self.mask[order]
        self.routing = self.routing.select(order, self._selections())
        self._narrow()

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
            self._shift(self._spare())
            assert self.cache.length < self._engine.kv.context

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
        return [row.request.selection for row in self.rows]


class Prompts(Group):
    """Rows whose prompts are still on their way: padded on the left, so that they end at the same column."""

    def __init__(self, engine: Engine, rows: Sequence[Row], cache: KvCache) -> None:
        super().__init__(engine, rows, cache)
        self.logits: Tensor | None = None  # [B, V], of the prompts' last tokens
        texts = [row.sent_first for row in rows]
        lengths = torch.tensor([len(text) for text in texts], device=engine.device)  # [B]
        width = int(lengths.max())
        self._full = (torch.arange(width, device=engine.device) >= width - lengths.unsqueeze(1)).long()  # [B, width]
        self._ids = torch.full((len(rows), width), PAD, device=engine.device)  # [B, width]
        for place, text in enumerate(texts):
            self._ids[place, width - len(text) :] = torch.tensor(text, device=engine.device)

    def advance(self, tokens: int) -> None:
        """Send the next columns of about `tokens` tokens through. After the last one there are `logits`."""
        start, width = self.cache.length, self._ids.shape[1]
        end = min(width, start + max(1, tokens // len(self.rows)))
        with ExitStack() as stack:
            scored = any(row.request.sampling.prompt_logprobs for row in self.rows)
            heard = stack.enter_context(self._engine.head.listening()) if scored else []
            logits = self._forward(self._ids[:, start:end], self._full[:, :end])
        for hidden in heard:
            self._score(hidden, start, end)
        self.mask = self._full[:, :end]  # [B, S]
        self.logits = logits if end == width else None

    def _score(self, hidden: Tensor, start: int, end: int) -> None:
        """The prompts' own tokens, by what `hidden` [B, end - start, H] says of the next column."""
        last = min(end, self._ids.shape[1] - 1)
        for place, row in enumerate(self.rows):
            wanted = row.request.sampling
            if not wanted.prompt_logprobs or wanted.logprobs is None or row.tokens:  # escalated later: they are out
                continue
            first = max(start, self._ids.shape[1] - len(row.request.prompt))  # where its padding ends
            if not row.prompt_scores:
                row.prompt_scores.append(Score(row.request.prompt[0], None))
            tokens = self._ids[place, first + 1 : last + 1].tolist()
            columns = hidden[place, first - start : last - start]  # [n, H]
            row.prompt_scores += self._engine.head.scores(columns, tokens, wanted.logprobs)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at `places` alone."""
        order = self.rows
        super().keep(places)
        at = [order.index(row) for row in self.rows]
        self._ids, self._full = self._ids[at], self._full[at]
        self.logits = None if self.logits is None else self.logits[at]

    def _narrow(self) -> None:
        """Columns are counted from the prompts' common start: they stay as long as prompts are on their way."""
