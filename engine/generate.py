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
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from engine.arrivals import GLANCE_SECONDS, Interrupted
from engine.group import Group
from engine.pause import Pause
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
        self._pause = Pause(engine)  # while it has rows, no exact row goes on

    def __enter__(self) -> Batch:
        self._pool = self._stack.enter_context(self._engine.kv.lend())
        self._running = Group(self._engine, [], self._pool.window(0, 0))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for row in self._rows():
            row.close()
        self._pause.end()
        self._stack.close()

    def __len__(self) -> int:
        """Rows admitted and not finished."""
        return len(self._rows())

    @property
    def free_rows(self) -> int:
        return self._engine.plan.max_batch - len(self)

    @property
    def full(self) -> bool:
        return not self.free_rows

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
        begin, or one that it shares with others has failed; where it fails later, the row ends with a FailedEvent.
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
        self._engine.bank.work()
        yield from self._look_after_pause()
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
        joining = self._joining
        if joining is not None and joining.waits_exactly and self._pause.rows and self._others_arrived:
            self._put_back(joining)
        group = self._joining = self._joining or self._gather()
        if group is None or group.logits is not None or (self._pause.rows and group.exact):
            return []
        try:
            with self._watched(group):
                self._advance(group)
        except Interrupted as broken:
            self._break_off(group, broken)
        except MoepagerError as error:
            self._joining = None
            return _failed(group, range(len(group.rows)), error)
        return []

    def _break_off(self, group: Prompts, broken: Interrupted) -> None:
        """Exact prompts go on when what they wait for is there; others, whose bytes their rows lease, begin anew."""
        if group.exact:
            self._pause.begin(group.exact, broken)
        else:
            self._engine.bank.let_go(broken.keys)
            self._put_back(group)

    def _put_back(self, group: Prompts) -> None:
        """They begin anew later."""
        self._joining = None
        self._arrived = [*group.rows, *self._arrived]
        for row in group.rows:
            row.begin_anew()

    @contextmanager
    def _watched(self, group: Group) -> Iterator[None]:
        """A pass that waits for experts may be broken off; an exact one that was not has got through."""
        arrivals, exact = self._engine.bank.arrivals, group.exact
        if exact:
            arrivals.interrupted = partial(self._holds_up, exact, self._pause.patience)
        elif not all(row.there for row in group.rows):
            arrivals.interrupted = partial(self._gives_way, group)
        try:
            yield
        finally:
            arrivals.interrupted = None
        if exact:
            self._pause.got_through()

    def _gives_way(self, group: Group, seconds: float) -> bool:
        """Whether prompts that wait for their experts, for `seconds` by now, are broken off: nobody wants them, or
        others could run and the wait is long: by what is missing or, on a disk that stalls, by what it has taken."""
        if all(row.request.cancelled.is_set() for row in group.rows):
            return True
        left = max(row.missing_seconds for row in group.rows)
        return self._pressing(self) and max(left, seconds) > PATIENT_SECONDS

    def _holds_up(self, exact: Sequence[Row], patience: float, seconds: float) -> bool:
        """Whether a pass that waits for experts of `exact`, for `seconds` by now, is broken off: one of them is wanted
        no more, or others who need nothing from the disk have stood still for long enough."""
        if any(row.request.cancelled.is_set() for row in exact):
            return True
        return seconds >= patience and (self._others or self._pressing(self))

    @property
    def _others_arrived(self) -> bool:
        """Whether a prompt could go through now, if there were a place."""
        return any(map(self._may_begin, self._arrived))

    @property
    def _others(self) -> bool:
        """Whether there are rows that need nothing from the disk."""
        return any(row.there and row.request.mode != "exact" for row in self._rows())

    def _look_after_pause(self) -> Sequence[FailedEvent]:
        """Exact rows go on when what they wait for is there, and end where it can't be read."""
        if not self._pause.rows:
            return []
        alive = self._rows()
        self._pause.rows = waiting = [row for row in self._pause.rows if row in alive]
        try:
            if waiting:
                self._pause.poll(0.0 if self._others else GLANCE_SECONDS)
            else:
                self._pause.end()
        except MoepagerError as error:
            self._leave(waiting)
            return [FailedEvent(row.number, error) for row in waiting]
        return []

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
        exact = group.exact
        standing = exact if self._pause.rows else []
        if len(standing) == len(group.rows):
            return []
        try:
            with nullcontext() if standing else self._watched(group):
                logits = group.decode(standing)
        except Interrupted as broken:
            self._pause.begin(exact, broken)
            return []
        except MoepagerError as error:  # those that page while they decode, where there are any; the others try again
            return _failed(group, [group.rows.index(row) for row in exact] or range(len(group.rows)), error)
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
        there = [row for row in self._arrived if self._may_begin(row)]
        reading = [] if self._running.rows else [row for row in self._arrived if not (row.there or row.gave_way)]
        ready = there or [row for row in reading if row.request.selection == reading[0].request.selection]
        if not ready:
            return None
        first = ready[0]
        exact = first.request.mode == "exact"
        rows = [row for row in ready if (row.request.mode == "exact") == exact and _near(row, first)]
        self._arrived = [row for row in self._arrived if row not in rows]
        return Prompts(self._engine, rows, self._pool.window(len(self._running.rows), len(rows)))

    def _may_begin(self, row: Row) -> bool:
        """Whether its experts are there or, if it is exact, can be paged in: one that was escalated may find all slots
        leased, and one that was broken off waits for its bytes."""
        if row.request.selection is not None:
            return row.there
        return self._engine.bank.reaches_all and not self._pause.rows

    def _advance(self, group: Prompts) -> None:
        """Few tokens while others wait for them, unless each pass would page everything again: then all, for one layer.

        What is read on a guess is for the next layer of the same pass, so there prompts stay with whole passes.
        """
        engine, whole = self._engine, self._engine.plan.chunk_tokens
        pages = group.rows[0].request.mode == "exact" and not engine.admission.holds_all
        if not engine.passes.goes_on:
            group.advance(whole if group.at_start else 1)
        elif pages and engine.passes.decoders and engine.board.lookahead is None:
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
