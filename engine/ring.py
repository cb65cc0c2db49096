"""The way of bytes that change between file and slot: buffers that the reader's threads fill and the owner empties.

Several experts are on their way at once, each group of them in a buffer of its own. A buffer is filled anew only when
its experts are in their slots or nobody wants them any more. All of it is the owner's: nothing here is called by the
reader's threads, and what they write into a buffer ends with its transfer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from math import inf

import torch
from torch import Tensor

from engine.delivery import Passage
from engine.layout import SlotLayout
from engine.plan import RingShape
from engine.reader import Meter, Reader
from engine.residency import Load
from engine.staging import Buffer, Staging
from engine.transfer import Transfer
from store.errors import CheckpointError
from store.experts import ExpertMap, ExpertSpan

GLANCE_SECONDS = 0.02  # between two looks whether a disk stalls


class Cargo:
    """A group of experts that fits one buffer, and where it is: queued, read into a buffer, or on its way out of it."""

    def __init__(self, relay: Relay, loads: Sequence[Load], spans: Sequence[ExpertSpan], urgent: bool) -> None:
        self.relay, self.loads, self.spans, self.urgent = relay, loads, spans, urgent
        self.buffer: Buffer | None = None
        self.transfer: Transfer | None = None
        self.leaving: torch.cuda.Event | None = None
        self.there = False

    @property
    def landed(self) -> bool:
        """Whether its bytes are in the buffer, and nobody has touched them yet."""
        return self.leaving is None and self.transfer is not None and self.transfer.landed

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


class Relay:
    """A passage by way of the ring: a group is there once it is in its slots. See engine.delivery.Passage."""

    def __init__(self, ring: Ring, groups: Sequence[Sequence[Load]], experts: ExpertMap, urgent: bool) -> None:
        self.read = 0
        self.seconds = 0.0
        self._ring = ring
        self.cargos = [Cargo(self, loads, [experts.span(load.key) for load in loads], urgent) for loads in groups]
        self.error: BaseException | None = None
        self._given_up = False
        self._started = time.monotonic()

    @property
    def landed(self) -> bool:
        return all(cargo.there for cargo in self.cargos)

    @property
    def over(self) -> bool:
        return self.error is not None or self.landed

    @property
    def failure(self) -> BaseException | None:
        self._ring.give_up_failed()
        return None if self._given_up else self.error

    def has(self, group: int) -> bool:
        return self.cargos[group].there

    def wait(self, group: int, seconds: float = inf) -> bool:
        """Whether the group is in its slots, after at most `seconds`, in which others may get there, too."""
        cargo = self.cargos[group]
        until = time.monotonic() + seconds
        while not cargo.there:
            if self.error is not None:
                raise self.error
            left = until - time.monotonic()
            if left <= 0:
                return False
            if not self._ring.turn(cargo):
                self._ring.rest(left)
        return True

    def cancel(self) -> None:
        if not self.over:
            self._given_up = True
            self.fail(CheckpointError("The read was given up, because nobody waits for it any more."))

    def fail(self, error: BaseException) -> None:
        """Nothing of it gets into a slot any more."""
        self.error = self.error or error
        self._ring.drop(self)

    def arrived(self, cargo: Cargo) -> None:
        cargo.there = True
        self.seconds = time.monotonic() - self._started


class Ring:
    """Reads begin in the order in which they were asked for, urgent ones first, as buffers are free."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, views: Sequence[tuple[Tensor, ...]], reader: Reader,
        device: torch.device,
    ) -> None:  # fmt: skip
        """`views` are the slots' parameters."""
        self.staging = Staging(layout, experts, RingShape.of(experts.staged_bytes, experts.experts), device)
        self._experts, self._views, self._reader = experts, views, reader
        self._meter = Meter()  # of what the owner does
        self._free = list(self.staging.buffers)
        self._queue: deque[Cargo] = deque()
        self._busy: list[Cargo] = []  # those that have a buffer, the oldest first
        self._changed = threading.Condition()  # of all transfers into the ring

    @property
    def bytes_per_second(self) -> float | None:
        return self._meter.bytes_per_second

    def groups(self, loads: Sequence[Load]) -> list[list[Load]]:
        """What shares a buffer: experts of one layer, as many as it holds."""
        groups: list[list[Load]] = []
        for load in loads:
            last = groups[-1] if groups else []
            together = [*last, load]
            alike = bool(last) and last[0].key.layer == load.key.layer
            if alike and self.staging.has_room([self._experts.span(one.key) for one in together]):
                last.append(load)
            else:
                groups.append([load])
        return groups

    def start(self, groups: Sequence[Sequence[Load]], urgent: bool) -> Relay:
        relay = Relay(self, groups, self._experts, urgent)
        if urgent:
            self._queue.extendleft(reversed(relay.cargos))
        else:
            self._queue.extend(relay.cargos)
        self._refill()
        if relay.error is not None:  # a file that is not there is an error of the caller's, now
            raise relay.error
        return relay

    def hurry(self, passage: Passage) -> None:
        mine = [cargo for cargo in (*self._busy, *self._queue) if cargo.relay is passage]
        for cargo in mine:
            cargo.urgent = True
            if cargo.transfer is not None:
                self._reader.hurry(cargo.transfer)
        self._queue = deque(sorted(self._queue, key=lambda cargo: cargo not in mine))
        self._refill()

    def work(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self.turn() and time.monotonic() < until:
            pass

    def turn(self, wanted: Cargo | None = None) -> bool:
        """Something that needs no waiting: reads begin, and one buffer is emptied, that of `wanted` if it can be.

        Whether a buffer was emptied, or given up.
        """
        gone = self.give_up_failed() + self._let_go_what_left()
        self._refill()
        landed = [cargo for cargo in self._busy if cargo.landed]
        if not landed:
            return gone > 0
        self._empty(min(landed, key=lambda cargo: (cargo is not wanted, not cargo.urgent)))
        self._refill()
        return True

    def rest(self, seconds: float) -> None:
        """Until a read ends or a device has copied, for at most `seconds`, or until a stalled disk may be noticed."""
        for cargo in self._busy:
            if cargo.leaving is not None:
                cargo.leaving.synchronize()
                return
        with self._changed:
            if not any(cargo.transfer is not None and cargo.transfer.over for cargo in self._busy):
                self._changed.wait(min(seconds, GLANCE_SECONDS))

    def give_up_failed(self) -> int:
        """Relays fail of which a read has failed or stalls. How many did."""
        looked_at = [(cargo.relay, _failure(cargo.transfer)) for cargo in self._busy if cargo.transfer is not None]
        failed = [(relay, failure) for relay, failure in looked_at if failure is not None]
        for relay, failure in failed:
            relay.fail(failure)
        return len(failed)

    def drop(self, relay: Relay) -> None:
        """Its reads end, and its buffers are free."""
        self._queue = deque(cargo for cargo in self._queue if cargo.relay is not relay)
        for cargo in [cargo for cargo in self._busy if cargo.relay is relay]:
            self._let_go(cargo)

    def _refill(self) -> None:
        """Begin reads as long as buffers are free."""
        if self._queue and self._queue[0].urgent:
            self._take_back()
        while self._queue and self._free:
            cargo = self._queue.popleft()
            cargo.buffer = self._free.pop()
            self._busy.append(cargo)
            try:
                extents = self.staging.extents(cargo.buffer, cargo.spans)
                cargo.transfer = self._reader.start([extents], changed=self._changed)
            except CheckpointError as error:  # a file that is gone
                cargo.relay.fail(error)

    def _take_back(self) -> None:
        """What is not urgent and has not begun gives up its buffer, and its place before the disk."""
        urgent = sum(cargo.urgent for cargo in self._queue)
        for cargo in reversed(self._busy):
            if not cargo.urgent and cargo.transfer is not None and not cargo.transfer.begun:
                self._let_go(cargo)
                self._queue.insert(urgent, cargo)

    def _empty(self, cargo: Cargo) -> None:
        """Its experts go into their slots."""
        assert cargo.buffer is not None, cargo.loads
        views = [self._views[load.slot] for load in cargo.loads]
        self._meter.begin()
        try:
            cargo.leaving = self.staging.fill(cargo.buffer, cargo.spans, views)
        except Exception as error:  # whoever wants these experts hears of it, not who happens to wait
            self._meter.end(0)
            cargo.relay.fail(error)
            return
        if cargo.leaving is None:
            self._arrive(cargo)

    def _let_go_what_left(self) -> int:
        """How many groups a device has copied meanwhile."""
        left = [cargo for cargo in self._busy if _is_over(cargo.leaving)]
        for cargo in left:
            self._arrive(cargo)
        return len(left)

    def _arrive(self, cargo: Cargo) -> None:
        self._meter.end(cargo.nbytes)
        cargo.leaving = None
        self._let_go(cargo)
        cargo.relay.arrived(cargo)

    def _let_go(self, cargo: Cargo) -> None:
        """Its buffer is free: nobody writes into it any more, nor reads out of it."""
        assert cargo.buffer is not None, cargo.loads
        if cargo.transfer is not None:
            cargo.transfer.cancel()
            cargo.relay.read += cargo.transfer.read
        if cargo.leaving is not None:
            cargo.leaving.synchronize()
            self._meter.end(0)
        self._busy.remove(cargo)
        self._free.append(cargo.buffer)
        cargo.buffer = cargo.transfer = cargo.leaving = None


def _failure(transfer: Transfer) -> Exception | None:
    """What whoever waited for the transfer would hear; also where the reader was closed."""
    try:
        transfer.wait(0, 0.0)
    except Exception as error:
        return error
    return None


def _is_over(event: torch.cuda.Event | None) -> bool:
    return event is not None and bool(event.query())  # type: ignore[no-untyped-call]
