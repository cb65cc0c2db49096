"""Continuous batching: requests join a running batch at a token boundary and leave on their own.

Prompts go through in chunks, in rows of the cache of their own, with a token of every running row between two chunks,
or between two layers where each chunk would page all experts again; then they are aligned with the running rows. Nobody
who runs waits for another's selection: while it is read, a prompt waits beside the rows that run, and where none runs
it goes through layer by layer as its experts come.
Knows rows and boundaries, not who asked nor what should run next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from engine.arrivals import GLANCE_SECONDS, Interrupted
from engine.group import Group
from engine.prompts import Prompts
from engine.requests import Event, FailedEvent, GenerationRequest, Submission
from engine.row import Row
from store.errors import BudgetError, MoepagerError
from store.records import Selection

if TYPE_CHECKING:
    from torch import Tensor

    from engine.engine import Engine

JOIN_TOKENS = 128  # of prompts between two tokens of the rows that run
PATIENT_SECONDS = 0.25  # of reading that others, who could run at once, are held up by a prompt that waits for it
NEAR = 32  # prompts whose lengths differ by less go through together, and so do those within a factor of two


class Batch:
    """The rows of an engine. Use as a context: it holds the KV cache; every lease is given back when it ends.

    The caller admits requests between steps, each with a number of its own, and consumes every step to its end.
    """

    def __init__(self, engine: Engine, pressing: Callable[[Batch], bool] = lambda _: False) -> None:
        """`pressing` says whether somebody waits to be admitted who could run at once."""
        self._engine = engine
        self._pressing = pressing
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
        if self.full or not (self.may_swap or self._engine.bank.holds(selection or ())):
            return False
        spare = selection is None or any(row.request.mode == "exact" for row in self._rows())
        return self._engine.admission.has_room(selection, spare=spare)

    @property
    def may_swap(self) -> bool:
        """Whether one more row may wait for the disk: at most half of all do while others run, so that whoever needs
        nothing from it finds a row."""
        reading = sum(not row.there for row in self._rows())
        return not self._running.rows or reading < max(1, self._engine.plan.max_batch // 2)

    def admit(self, number: int, request: GenerationRequest, submission: Submission | None = None) -> None:
        """Take the request in, and begin to read the experts that it lacks. It was checked, and fits. Events carry
        `number`.

        Without a `submission` it is made now. Raises MoepagerError, with nothing changed, where the read can't even
        begin; where it fails later, the row ends with a FailedEvent.
        """
        submission = submission or Submission(time.perf_counter(), self._engine.admission.predict(request))
        row = Row(self._engine, number, request, submission)
        if not self.fits(request.selection):
            raise BudgetError(
                f"The request does not fit beside the {len(self)} that run and what is leased: at most "
                f"{self._engine.plan.max_batch} rows and {self._engine.plan.slots} slots. Wait for one to end."
            )
        if not request.cancelled.is_set():  # one that is cancelled ends at the next step and costs nothing
            try:
                row.lease()
            except BaseException:
                row.close()
                raise
        self._arrived.append(row)

    def step(self) -> Iterator[Event | FailedEvent]:
        """One token boundary: a chunk or a layer of the prompts that join, and a token of every row that runs."""
        yield from self._drop_cancelled()
        yield from self._prefill()
        yield from self._look_after()
        yield from self._join()
        yield from self._decode()

    def _rows(self) -> list[Row]:
        joining = [] if self._joining is None else self._joining.rows
        return [*self._running.rows, *joining, *self._arrived]

    def _drop_cancelled(self) -> list[Event]:
        gone = [row for row in self._rows() if row.request.cancelled.is_set()]
        if not gone:
            return []
        events: list[Event] = [row.finished("cancelled", 1.0) for row in gone if row in self._arrived]
        for group in (self._joining, self._running):
            if group is not None and any(row in gone for row in group.rows):
                shares = zip(group.rows, group.coverage(), strict=True)
                events += [row.finished("cancelled", coverage) for row, coverage in shares if row in gone]
        self._leave(gone)
        return events

    def _leave(self, gone: Sequence[Row]) -> None:
        """Those rows end, wherever they are."""
        for row in gone:
            if row in self._arrived:
                self._arrived.remove(row)
                row.close()
        for group in (self._joining, self._running):
            if group is not None:
                group.keep([place for place, row in enumerate(group.rows) if row not in gone])
        if self._joining is not None and not self._joining.rows:
            self._joining = None

    def _prefill(self) -> Sequence[Event | FailedEvent]:
        group = self._joining = self._joining or self._gather()
        if group is None or group.logits is not None:
            return []
        bank = self._engine.bank
        if not all(row.there for row in group.rows):
            bank.arrivals.interrupted = partial(self._gives_way, group)
        try:
            self._advance(group)
        except Interrupted:
            self._joining = None
            self._arrived = [*group.rows, *self._arrived]
            for row in group.rows:
                row.begin_anew()
        except MoepagerError as error:
            self._joining = None
            return _failed(group, range(len(group.rows)), error)
        finally:
            bank.arrivals.interrupted = None
        return []

    def _gives_way(self, group: Group) -> bool:
        """Whether prompts that wait for their experts are broken off: nobody wants them, or others could run."""
        if all(row.request.cancelled.is_set() for row in group.rows):
            return True
        return self._pressing(self) and max(row.missing_seconds for row in group.rows) > PATIENT_SECONDS

    def _look_after(self) -> Sequence[FailedEvent]:
        """See what was read; rows whose experts can't be read end, all that wait for the same with one error.

        Where nothing is left to compute until experts come, wait for them, but not for long.
        """
        computes = self._running.rows or (self._joining is not None and self._joining.logits is None)
        errors: dict[Selection | None, MoepagerError] = {}
        for row in self._rows():
            if row.request.selection not in errors:
                try:
                    row.poll(0.0 if computes else GLANCE_SECONDS)
                except MoepagerError as error:
                    errors[row.request.selection] = error
        failed = [row for row in self._rows() if not row.there and row.request.selection in errors]
        if failed:
            self._leave(failed)
        return [FailedEvent(row.number, errors[row.request.selection]) for row in failed]

    def _join(self) -> Sequence[Event | FailedEvent]:
        """Prompts that went through go on with the rows that run, once nothing is read for them any more."""
        group = self._joining
        if group is None or group.logits is None or not all(row.there for row in group.rows):
            return []
        self._joining = None
        events = self._take(group, group.logits)
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
        return self._take(group, logits)

    def _take(self, group: Group, logits: Tensor) -> list[Event | FailedEvent]:
        """A token a row. Those that were escalated by it leave the group and arrive anew, as exact requests."""
        rows = [row for row in group.rows if row.request.guard is not None]
        events, left = group.take(logits)
        group.keep(left)
        self._arrived += [row for row in rows if row.request.guard is None]
        return events

    def _gather(self) -> Prompts | None:
        """The oldest arrival, with all others of its mode whose prompts are about as long.

        Those whose experts are there go first. Others only where nothing runs, and then with their like alone: a pass
        waits for the experts of all its rows.
        """
        there = [row for row in self._arrived if row.there and self._reaches(row)]
        reading = [] if self._running.rows else [row for row in self._arrived if not (row.there or row.gave_way)]
        ready = there or [row for row in reading if row.request.selection == reading[0].request.selection]
        if not ready:
            return None
        first = ready[0]
        exact = first.request.mode == "exact"
        rows = [row for row in ready if (row.request.mode == "exact") == exact and _near(row, first)]
        self._arrived = [row for row in self._arrived if row not in rows]
        return Prompts(self._engine, rows, self._pool.window(len(self._running.rows), len(rows)))

    def _reaches(self, row: Row) -> bool:
        """Whether its experts can be paged in, if it is exact: one that was escalated may find all slots leased."""
        return row.request.selection is not None or self._engine.bank.reaches_all

    def _advance(self, group: Prompts) -> None:
        """Few tokens while others wait for them, unless each pass would page everything again: then all, for one layer.

        What is read on a guess is for the next layer of the same pass, so there prompts stay with whole passes.
        """
        engine, whole = self._engine, self._engine.plan.chunk_tokens
        pages = group.rows[0].request.mode == "exact" and not engine.admission.holds_all
        if pages and engine.passes.decoders and engine.board.lookahead is None:
            group.advance_layer(whole, engine.plan.carried_tokens)
        else:
            group.advance(whole if pages or not self._running.rows else min(whole, JOIN_TOKENS))


def _near(row: Row, first: Row) -> bool:
    shorter, longer = sorted((len(row.sent_first), len(first.sent_first)))
    return longer - shorter < NEAR or longer <= 2 * shorter


def _failed(group: Group, places: Sequence[int], error: MoepagerError) -> list[Event | FailedEvent]:
    """The rows at `places` end with `error`; the group goes on without them."""
    events: list[Event | FailedEvent] = [FailedEvent(group.rows[place].number, error) for place in places]
    group.keep([place for place in range(len(group.rows)) if place not in places])
    return events
