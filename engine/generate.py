"""Prefill and decode of one batch as a generator of events. Rows end on their own; the rest goes on without them.

Knows the model's call and the cache, not who asked. B rows, S positions, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.requests import Event, FinishedEvent, GenerationRequest, Reason, Served, TokenEvent
from engine.routing import Routing
from engine.sampling import Sampler, next_tokens
from engine.text import Detokenizer, StopFilter
from store.records import Selection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.kvcache import KvCache

PAD = 0  # any token: padding is masked everywhere


@dataclass(slots=True)
class _Row:
    """One request on its way."""

    number: int
    request: GenerationRequest
    sampler: Sampler
    detokenizer: Detokenizer
    stops: StopFilter
    experts: int
    experts_paged: int = 0
    bytes_paged: int = 0
    swap_seconds: float = 0.0
    ttft_seconds: float = 0.0
    tokens: int = 0
    text: str = ""

    def take(self, token: int, eos: frozenset[int]) -> tuple[TokenEvent, Reason | None]:
        """Account for a sampled token; a reason where it is the row's last."""
        self.tokens += 1
        reason: Reason | None = None
        if token in eos and not self.request.sampling.ignore_eos:
            reason, text = "stop", ""
        else:
            text = self.stops.push(self.detokenizer.push(token))
            if self.stops.stopped:
                return self._event(token, text), "stop"
            reason = "length" if self.tokens == self.request.sampling.max_tokens else None
        if reason is not None:
            text += self.stops.push(self.detokenizer.flush())
            if self.stops.stopped:
                return self._event(token, text), "stop"
            text += self.stops.flush()
        return self._event(token, text), reason

    def _event(self, token: int, text: str) -> TokenEvent:
        self.text += text
        return TokenEvent(self.number, token, text)

    def finished(self, reason: Reason, coverage: float, resident_bytes: int) -> FinishedEvent:
        served = Served(
            mode=self.request.mode,
            coverage=coverage,
            experts=self.experts,
            experts_paged=self.experts_paged,
            bytes_paged=self.bytes_paged,
            swap_ms=1000 * self.swap_seconds,
            ttft_ms=1000 * self.ttft_seconds,
            resident_bytes=resident_bytes,
        )
        return FinishedEvent(self.number, reason, self.text, len(self.request.prompt), self.tokens, served)


class Batch:
    """Requests that run together: they were checked, fit together, and their selections are leased here."""

    def __init__(self, engine: Engine, requests: Sequence[tuple[int, GenerationRequest]]) -> None:
        self._engine = engine
        self._rows = [self._row(number, request) for number, request in requests]
        self._started = time.perf_counter()

    def run(self) -> Iterator[Event]:
        """Events until every row is finished. Leases and cache are given back however this ends."""
        for row in [row for row in self._rows if row.request.cancelled.is_set()]:
            self._rows.remove(row)
            yield row.finished("cancelled", 1.0, self._engine.resident_bytes)
        if not self._rows:
            return
        with ExitStack() as stack:
            self._lease(stack)
            self._engine.require_free_slot(self._selections())
            cache = stack.enter_context(self._engine.kv.lend(len(self._rows)))
            yield from self._generate(cache)

    def _row(self, number: int, request: GenerationRequest) -> _Row:
        tokenizer, sampling = self._engine.tokenizer, request.sampling
        card, selection = self._engine.card, request.selection
        experts = card.layers * card.experts if selection is None else len(selection)
        return _Row(
            number, request, Sampler(sampling), Detokenizer(tokenizer), StopFilter(sampling.stop), experts
        )  # fmt: skip

    def _lease(self, stack: ExitStack) -> None:
        """Lease each selection; rows that share one share its cost, and the first of them accounts for it."""
        for row in self._rows:
            if row.request.selection is not None:
                lease = stack.enter_context(self._engine.lease(row.request.selection))
                row.experts_paged, row.bytes_paged, row.swap_seconds = (
                    lease.experts_paged,
                    lease.bytes_paged,
                    lease.seconds,
                )

    def _generate(self, cache: KvCache) -> Iterator[Event]:
        routing = self._routing()
        mask = self._prompt_mask()
        logits = self._prefill(cache, routing, mask)
        if logits is None:
            for row, coverage in zip(self._rows, routing.coverage(), strict=True):
                yield row.finished("cancelled", coverage, self._engine.resident_bytes)
            return
        while self._rows:
            tokens = next_tokens(logits, [row.sampler for row in self._rows])
            self._note_first_token()
            left: list[int] = []
            for place, (row, token) in enumerate(zip(list(self._rows), tokens, strict=True)):
                event, reason = row.take(token, self._engine.tokenizer.eos)
                yield event
                if row.request.cancelled.is_set():
                    reason = reason or "cancelled"
                if reason is None:
                    left.append(place)
                else:
                    yield row.finished(reason, routing.coverage()[place], self._engine.resident_bytes)
            if len(left) < len(self._rows):
                routing, mask, tokens = self._narrow(left, cache, routing, mask, tokens)
            if self._rows:
                mask = torch.cat([mask, mask.new_ones(len(left), 1)], 1)  # [B, S + 1]
                logits = self._step(cache, routing, mask, tokens)

    def _narrow(
        self, left: list[int], cache: KvCache, routing: Routing, mask: Tensor, tokens: list[int]
    ) -> tuple[Routing, Tensor, list[int]]:
        """Go on with the rows `left` alone."""
        self._rows = [self._rows[place] for place in left]
        cache.keep(left)
        return routing.select(left, self._selections()), mask[left], [tokens[place] for place in left]

    def _selections(self) -> list[Selection | None]:
        return [row.request.selection for row in self._rows]

    def _routing(self) -> Routing:
        return Routing(self._engine.board, self._selections(), self._engine.device)

    def _prompt_mask(self) -> Tensor:
        """Prompts end at the same column: i64 [B, S], 0 where a row is padded on its left."""
        lengths = torch.tensor([len(row.request.prompt) for row in self._rows], device=self._engine.device)  # [B]
        width = int(lengths.max())
        return (torch.arange(width, device=self._engine.device) >= width - lengths.unsqueeze(1)).long()

    def _prefill(self, cache: KvCache, routing: Routing, mask: Tensor) -> Tensor | None:
        """Send the prompts through in chunks of columns. Logits of the last column, [B, V]; None if nobody waits."""
        rows, width = mask.shape
        ids = torch.full((rows, width), PAD, device=mask.device)  # [B, S]
        for place, row in enumerate(self._rows):
            ids[place, width - len(row.request.prompt) :] = torch.tensor(row.request.prompt, device=mask.device)
        columns = max(1, self._engine.plan.chunk_tokens // rows)
        with self._paging():
            for start in range(0, width, columns):
                end = min(width, start + columns)
                logits = self._engine.step(ids[:, start:end], mask[:, :end], cache, routing)
                if all(row.request.cancelled.is_set() for row in self._rows):
                    return None
        return logits

    def _step(self, cache: KvCache, routing: Routing, mask: Tensor, tokens: list[int]) -> Tensor:
        with self._paging():
            return self._engine.step(torch.tensor(tokens, device=mask.device).unsqueeze(1), mask, cache, routing)

    def _paging(self) -> _Paging:
        return _Paging(self._engine, [row for row in self._rows if row.request.mode == "exact"])

    def _note_first_token(self) -> None:
        elapsed = time.perf_counter() - self._started
        for row in self._rows:
            if row.tokens == 0:
                row.ttft_seconds = elapsed


class _Paging:
    """Shares what a pass paged in among the batch's exact rows; mask rows paid at their lease."""

    def __init__(self, engine: Engine, rows: Sequence[_Row]) -> None:
        self._paged, self._rows = engine.bank.paged, rows
        self._before = (0, 0, 0.0)

    def __enter__(self) -> None:
        self._before = (self._paged.experts, self._paged.bytes_needed, self._paged.seconds)

    def __exit__(self, *_: object) -> None:
        experts, needed, seconds = self._before
        for place, row in enumerate(self._rows):
            row.experts_paged += _share(self._paged.experts - experts, place, len(self._rows))
            row.bytes_paged += _share(self._paged.bytes_needed - needed, place, len(self._rows))
            row.swap_seconds += self._paged.seconds - seconds  # all of them waited


def _share(total: int, place: int, rows: int) -> int:
    """Whole shares that add up to the total."""
    return total // rows + (place < total % rows)
