"""Continuous batching: requests join a running batch at a token boundary and leave on their own.

Prompts go through in chunks, in rows of the cache of their own, with a token of every running row between two chunks;
then they are aligned with the running rows. Knows rows and boundaries, not who asked nor what should run next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from engine.group import Group, Prompts
from engine.requests import Event, FailedEvent, GenerationRequest
from engine.row import Row
from store.errors import BudgetError, MoepagerError
from store.records import Selection

if TYPE_CHECKING:
    from engine.engine import Engine

JOIN_TOKENS = 128  # of prompts between two tokens of the rows that run
NEAR = 32  # prompts whose lengths differ by less go through together, and so do those within a factor of two


class Batch:
    """The rows of an engine. Use as a context: it holds the KV cache; every lease is given back when it ends.

    The caller admits requests between steps, each with a number of its own, and consumes every step to its end.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._stack = ExitStack()
        self._arrived: list[Row] = []
        self._joining: Prompts | None = None
        self._running: Group

    def __enter__(self) -> Batch:
        self._pool = self._stack.enter_context(self._engine.kv.lend())
        self._running = Group(self._engine, [], self._pool.window(0, 0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for row in self._rows():
            row.close()
        self._stack.close()

    def __len__(self) -> int:
        """Rows admitted and not finished."""
        return len(self._rows())

    @property
    def full(self) -> bool:
        return len(self) == self._engine.plan.max_batch

    def fits(self, selection: Selection | None) -> bool:
        """Whether there is a row, and slots for a request's experts beside all that are leased; None: it is exact."""
        spare = selection is None or any(row.request.mode == "exact" for row in self._rows())
        return not self.full and self._engine.has_room(selection, spare=spare)

    def admit(self, number: int, request: GenerationRequest, submitted: float | None = None) -> None:
        """Lease the request's experts and take it in. It was checked, and fits. Events carry `number`.

        `submitted` is the time.perf_counter of when it was asked for. Raises MoepagerError, with nothing changed, where
        its experts could not be paged in.
        """
        row = Row(self._engine, number, request, time.perf_counter() if submitted is None else submitted)
        if not self.fits(request.selection):
            raise BudgetError(
                f"The request does not fit beside the {len(self)} that run and what is leased: at most "
                f"{self._engine.plan.max_batch} rows and {self._engine.plan.slots} slots. Wait for one to end."
            )
        if not request.cancelled.is_set():  # one that is cancelled ends at the next step and costs nothing
            row.lease()
        self._arrived.append(row)

    def step(self) -> Iterator[Event | FailedEvent]:
        """One token boundary: a chunk of the prompts that join, and a token of every row that runs."""
        yield from self._drop_cancelled()
        yield from self._prefill()
        yield from self._decode()

    def _rows(self) -> list[Row]:
        joining = [] if self._joining is None else self._joining.rows
        return [*self._running.rows, *joining, *self._arrived]

    def _drop_cancelled(self) -> list[Event]:
        gone = [row for row in self._arrived if row.request.cancelled.is_set()]
        events: list[Event] = []
        for row in gone:
            self._arrived.remove(row)
            row.close()
            events.append(row.finished("cancelled", 1.0))
        for group in (self._joining, self._running):
            if group is None or not any(row.request.cancelled.is_set() for row in group.rows):
                continue
            coverage = group.routing.coverage()
            left = [place for place, row in enumerate(group.rows) if not row.request.cancelled.is_set()]
            events += [
                row.finished("cancelled", coverage[place]) for place, row in enumerate(group.rows) if place not in left
            ]
            group.keep(left)
        if self._joining is not None and not self._joining.rows:
            self._joining = None
        return events

    def _prefill(self) -> Sequence[Event | FailedEvent]:
        group = self._joining = self._joining or self._gather()
        if group is None:
            return []
        try:
            logits = group.advance(self._chunk(group))
        except MoepagerError as error:
            self._joining = None
            return _failed(group, range(len(group.rows)), error)
        if logits is None:
            return []
        self._joining = None
        events, left = group.take(logits)
        group.keep(left)
        self._running.absorb(group)
        return events

    def _decode(self) -> Sequence[Event | FailedEvent]:
        group = self._running
        if not group.rows:
            return []
        try:
            logits = group.decode()
        except MoepagerError as error:  # those that page while they decode, where there are any; the others try again
            exact = [place for place, row in enumerate(group.rows) if row.request.mode == "exact"]
            return _failed(group, exact or range(len(group.rows)), error)
        events, left = group.take(logits)
        group.keep(left)
        return events

    def _gather(self) -> Prompts | None:
        """The oldest arrival, with all others of its mode whose prompts are about as long."""
        if not self._arrived:
            return None
        first = self._arrived[0].request
        rows = [row for row in self._arrived if row.request.mode == first.mode and _near(row.request, first)]
        self._arrived = [row for row in self._arrived if row not in rows]
        return Prompts(self._engine, rows, self._pool.window(len(self._running.rows), len(rows)))

    def _chunk(self, group: Group) -> int:
        """Tokens of prompts in one pass. Few while others wait for it, unless each pass would page everything again."""
        whole = self._engine.plan.chunk_tokens
        pages = group.rows[0].request.mode == "exact" and not self._engine.holds_all
        return whole if pages or not self._running.rows else min(whole, JOIN_TOKENS)


def _near(request: GenerationRequest, first: GenerationRequest) -> bool:
    shorter, longer = sorted((len(request.prompt), len(first.prompt)))
    return longer - shorter < NEAR or longer <= 2 * shorter


def _failed(group: Group, places: Sequence[int], error: MoepagerError) -> list[Event | FailedEvent]:
    """The rows at `places` end with `error`; the group goes on without them."""
    events: list[Event | FailedEvent] = [FailedEvent(group.rows[place].number, error) for place in places]
    group.keep([place for place in range(len(group.rows)) if place not in places])
    return events
