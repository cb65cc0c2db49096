"""The experts' memory on the device: one bank of slots for all layers. Executes what the residency decides.

Knows spans and bytes, not routing or text. Owned by one thread. S slots.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import inf

import numpy as np
import torch

from engine.delivery import Delivery
from engine.guesses import Guesses
from engine.layout import SlotLayout
from engine.paged import Paged
from engine.reader import Reader
from engine.residency import ABSENT, NOBODY, Load, Residency
from engine.transfer import Bytes, Extent
from store.errors import BudgetError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection

BIG = 2**20  # bytes of an expert from which it is awaited by itself; smaller ones are read layer by layer
GLANCE_SECONDS = 0.02  # between two looks whether a wait shall be broken off
SLICE_SECONDS = 0.02  # of reading in one `poll`, where it can't be done beside


class Interrupted(Exception):  # noqa: N818 - not an error
    """A pass that waited for experts was broken off, because there is something to do that needs none of them."""


@dataclass(slots=True)
class Lease:
    """What a lease costs: experts held, how many of them had to be read, from how many bytes."""

    experts: int
    experts_paged: int
    bytes_paged: int
    keys: tuple[ExpertKey, ...]
    delivery: Delivery | None
    waited: float  # seconds from the wish to the lease
    staged: Callable[[], float]  # seconds of those reads that go through a host buffer, one after the other

    @property
    def seconds(self) -> float:
        """How long the reads took; of a lease that was taken ahead of them, so far."""
        return max(self.waited, self.staged(), 0.0 if self.delivery is None else self.delivery.transfer.seconds)

    def __hash__(self) -> int:
        return id(self)


class Bank:
    """Slots in one allocation, faulted in once. `views[slot]` are the expert's parameters in the layout's order."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, slots: int, device: torch.device, reader: Reader,
        read_ahead: int = 0,
    ) -> None:  # fmt: skip
        """`read_ahead` is how many experts at most are read on a guess at a time; 0 where bytes need staging."""
        self.layout = layout
        self.residency = Residency(len(experts.layers), experts.experts, slots)
        self.paged = Paged()
        self._experts = experts
        self._total = len(experts.layers) * experts.experts
        self._reader = reader
        self._arriving: dict[ExpertKey, Delivery] = {}
        self._queued: dict[ExpertKey, Load] = {}  # leased ahead, to be read by us when it suits
        self._staged: dict[ExpertKey, float] = {}  # seconds that an expert's last read through the host buffer took
        self.interrupted: Callable[[], bool] | None = None  # asked while a pass waits for experts
        self.memory = torch.zeros(slots, layout.slot_bytes, dtype=torch.uint8, device=device)  # [S, slot_bytes]
        self.views = layout.views(self.memory)
        self._direct = layout.direct and device.type == "cpu"
        self._host: Bytes | None = self.memory.numpy() if self._direct else None
        assert self._direct or not read_ahead, read_ahead
        self.guesses = Guesses(self.residency, read_ahead, self._begin_guess, lambda key, _: self._let_go([key]))
        self._staging = None if self._direct else _host_buffer(experts.staged_bytes, device)

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes

    @property
    def expert_bytes(self) -> Sequence[int]:
        """Of one expert in the file, per layer."""
        return self._experts.expert_bytes

    @property
    def reaches_all(self) -> bool:
        """Whether any expert can be visited now: all are here, or there is a slot to page through."""
        return self.residency.available > 0 or self.residency.resident == self._total

    @contextmanager
    def lease(self, selection: Selection, *, ahead: bool = False) -> Iterator[Lease]:
        """Every expert of `selection` is resident and stays so until the block ends. Only what is missing is read.

        `ahead` begins before the reads have ended: `visit` waits for the experts that it is asked for, and raises what
        made their read fail. Raises BudgetError where other leases leave too few slots, CheckpointError where a read
        fails; both leave every other lease as it was.
        """
        keys = tuple(selection)
        started = time.perf_counter()
        loads, delivery = self._acquire(keys, ahead=ahead)
        try:
            size = sum(self._experts.span(load.key).nbytes for load in loads)
            waited = time.perf_counter() - started
            yield Lease(len(keys), len(loads), size, keys, delivery, waited, partial(self._staged_seconds, loads))
        finally:
            self._let_go(keys)

    def _staged_seconds(self, loads: Sequence[Load]) -> float:
        return sum(self._staged.get(load.key, 0.0) for load in loads)

    def wait(self, lease: Lease) -> None:
        """Until the last expert of a lease that was taken ahead is there. Raises what made a read fail."""
        for key in lease.keys if self.residency.unfilled else ():
            self._await(key)

    def poll(self, lease: Lease, seconds: float = 0.0) -> bool:
        """Whether all experts of a lease that was taken ahead are there, after waiting for at most `seconds`.

        Reads that somebody else gave up are begun anew. Raises what made a read fail.
        """
        missing = self._missing(lease)
        if not missing:
            return True
        for delivery in dict.fromkeys(self._arriving[key] for key in missing if key in self._arriving):
            self._look_at(delivery)
        if lost := [Load(key, self.residency.slot(key)) for key in missing if self._is_lost(key)]:
            self._start(lost, urgent=False)
        self._read_slice()
        missing = self._missing(lease)
        if seconds and missing and missing[-1] in self._arriving:
            self._await(missing[-1], seconds)
            missing = self._missing(lease)
        return not missing

    def _read_slice(self) -> None:
        """Some of what only the owner can read, one expert at least."""
        until = time.perf_counter() + SLICE_SECONDS
        while self._queued:
            self._read_staged([self._queued.pop(next(iter(self._queued)))])
            if time.perf_counter() >= until:
                return

    def holds(self, keys: Iterable[ExpertKey]) -> bool:
        """Whether all of them are in memory, to the last byte."""
        residency = self.residency
        slots = [residency.slot(key) for key in keys]
        return ABSENT not in slots and residency.unfilled.isdisjoint(slots)

    def missing_bytes(self, lease: Lease) -> int:
        """What has still to come of a lease that was taken ahead."""
        return sum(self._experts.span(key).nbytes for key in self._missing(lease))

    def at_hand(self, layer: int, experts: Sequence[int]) -> list[int] | None:
        """The slots of `experts`, NOBODY for what is no expert, good until another is read in; None where a byte of
        theirs is missing or a guess has to be settled: then they have to be visited."""
        residency = self.residency
        row = [*residency.table[layer], NOBODY]
        slots = [row[expert] for expert in experts]
        if residency.unfilled or self.guesses.open or ABSENT in slots:
            return None
        for slot in slots:
            residency.touch(slot)
        return slots

    def visit(self, layer: int, experts: Sequence[int]) -> Generator[tuple[int, int], None, None]:
        """Each of `experts` once, with its slot: what is there first, while the others are read.

        A slot is good until the next pair is asked for. Raises BudgetError where every slot is leased, CheckpointError
        where a read fails. What `guesses` expects of the next layer begins to be read once all of `experts` have slots.
        """
        for delivery in self.guesses.judge(layer, experts):
            self._reader.hurry(delivery.transfer)
        try:
            yield from self._visit(layer, experts)
        finally:
            self._close_guesses(layer)

    def _close_guesses(self, layer: int) -> None:
        for delivery in self.guesses.close(layer):
            self.paged.count(1, delivery.needed)

    def _visit(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        row, residency = self.residency.table[layer], self.residency
        missing = [expert for expert in experts if row[expert] == ABSENT]
        if not missing and not self.guesses.useful:
            yield from self._ready(layer, experts)
            return
        present = [expert for expert in experts if row[expert] != ABSENT]
        room = residency.room_beside([ExpertKey(layer, expert) for expert in present])
        if room or not missing:
            wave, missing = present + missing[:room], missing[room:]
            yield from self._page(layer, wave, last=not missing)
        else:
            yield from self._ready(layer, present)
        self._close_guesses(layer)  # their slots may be the only ones left
        while missing:
            wave, missing = missing[: residency.available], missing[residency.available :]
            if not wave:
                raise BudgetError(self._no_room(layer, len(missing)))
            yield from self._page(layer, wave, last=not missing)

    def _ready(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Experts that all have a slot, those whose bytes are there first."""
        row, residency = self.residency.table[layer], self.residency
        if residency.unfilled:
            experts = sorted(experts, key=lambda expert: row[expert] in residency.unfilled)
        for expert in experts:
            slot = row[expert]
            if slot in residency.unfilled:
                self._await(ExpertKey(layer, expert))
            residency.touch(slot)
            yield expert, slot

    def _page(self, layer: int, experts: Sequence[int], *, last: bool) -> Iterator[tuple[int, int]]:
        keys = [ExpertKey(layer, expert) for expert in experts]
        self._acquire(keys, ahead=True, urgent=True)
        try:
            if last:
                self.guesses.begin()
            yield from self._ready(layer, experts)
        finally:
            self._let_go(keys)

    def _begin_guess(self, key: ExpertKey) -> Delivery:
        """A transfer of its own, so that it can be given up alone."""
        loads = self.residency.plan([key])
        try:
            delivery = self._start(loads, urgent=False, guess=True)
        except BaseException:
            self.residency.release([key])
            raise
        assert delivery is not None, key
        return delivery

    def _acquire(
        self, keys: Collection[ExpertKey], *, ahead: bool, urgent: bool = False
    ) -> tuple[list[Load], Delivery | None]:
        """Pin, and read what nobody else is reading; after a failure all pins are gone."""
        loads = self.residency.plan(keys)
        new = {load.key for load in loads}
        loads += [Load(key, self.residency.slot(key)) for key in keys if key not in new and self._is_lost(key)]
        delivery = None
        try:
            delivery = self._start(loads, urgent=urgent or not ahead)
            for key in () if ahead else keys:
                self._await(key)
        except BaseException:
            self._let_go(keys)
            raise
        return loads, delivery

    def _let_go(self, keys: Collection[ExpertKey]) -> None:
        """Unpin. A read under way that brings a key which nobody else leases is given up: whoever leases another of its
        keys reads that again.
        """
        if self._arriving or self._queued:
            going = [key for key in keys if self.residency.is_last(key)]
            for key in going:
                self._queued.pop(key, None)
            for delivery in dict.fromkeys(self._arriving[key] for key in going if key in self._arriving):
                self._settle(delivery)
        self.residency.release(keys)

    def _missing(self, lease: Lease) -> list[ExpertKey]:
        unfilled, residency = self.residency.unfilled, self.residency
        return [key for key in lease.keys if residency.slot(key) in unfilled] if unfilled else []

    def _is_lost(self, key: ExpertKey) -> bool:
        """Whether the key has a slot, but nobody is reading its bytes any more: they failed, or were given up."""
        unread = self.residency.slot(key) in self.residency.unfilled
        return unread and key not in self._arriving and key not in self._queued

    def _look_at(self, delivery: Delivery) -> None:
        """Without waiting: account for what has landed. Raises what made it fail."""
        failure = delivery.transfer.failure
        if failure is not None or delivery.transfer.landed:
            self._settle(delivery)
        if failure is not None:
            raise failure

    def _await(self, key: ExpertKey, seconds: float = inf) -> None:
        """Until the bytes of a pinned key are there, `seconds` are over, or the wait is interrupted.

        A read that failed is over; whoever asks next begins another.
        """
        slot = self.residency.slot(key)
        if slot not in self.residency.unfilled:
            return
        self._queued.pop(key, None)
        delivery = self._arriving.get(key) or self._start([Load(key, slot)], urgent=True)
        assert delivery is not None or slot not in self.residency.unfilled, key
        if delivery is None:
            return
        began = time.perf_counter()
        try:
            while not delivery.transfer.wait(delivery.group[key], GLANCE_SECONDS if self.interrupted else seconds):
                if self.interrupted is None:
                    return
                if self.interrupted():
                    raise Interrupted
        except Interrupted:  # the read goes on
            raise
        except BaseException:
            self._settle(delivery)
            raise
        finally:
            self.paged.waited += time.perf_counter() - began
        if delivery.transfer.landed:
            self._settle(delivery)
        else:
            self._arrived(key)

    def _start(self, loads: Sequence[Load], *, urgent: bool, guess: bool = False) -> Delivery | None:
        """Begin to fill the slots. What can't go straight from the file into a slot is read by the owner itself: at
        once where it is urgent, else when it is asked for, or in slices by `poll`."""
        if not loads:
            return None
        if not self._direct and urgent:
            self._read_staged(loads)
            return None
        if not self._direct:
            for load in loads:
                self._queued[load.key] = load
                self._staged.pop(load.key, None)
            return None
        big = min(self._experts.expert_bytes) >= BIG
        groups = [list(group) for _, group in groupby(loads, key=lambda load: load.key if big else load.key.layer)]
        transfer = self._reader.start([self._extents(group) for group in groups], urgent)
        needed = sum(self._experts.span(load.key).nbytes for load in loads)
        delivery = Delivery(transfer, groups, needed, guess=guess)
        self._arriving.update(dict.fromkeys(delivery.group, delivery))
        if not guess:
            self.paged.count(len(loads), needed)
        return delivery

    def _settle(self, delivery: Delivery) -> None:
        """Nothing of a delivery lands after this; what is there counts as there."""
        delivery.transfer.cancel()
        mine = [key for key in delivery.group if self._arriving.get(key) is delivery]
        for key in mine:
            if delivery.transfer.has(delivery.group[key]):
                self._arrived(key)
            else:
                del self._arriving[key]
                if not delivery.guess:
                    self.paged.count(-1, -self._experts.span(key).nbytes)
        if not delivery.settled:
            delivery.settled = True
            self.paged.bytes_read += delivery.transfer.read
            self.paged.seconds += 0.0 if delivery.guess else delivery.transfer.seconds

    def _arrived(self, key: ExpertKey) -> None:
        del self._arriving[key]
        self.residency.landed(key)

    def _extents(self, loads: Sequence[Load]) -> list[Extent]:
        """File bytes are slot bytes: the reader puts them where they are used."""
        assert self._host is not None
        extents = []
        for load in loads:
            slot = self._host[load.slot]
            for part in self._experts.span(load.key).parts:
                start, end = self.layout.byte_range(part.projection)
                extents.append(Extent(part.file, part.offset, part.nbytes, slot[start:end]))
        return extents

    def _read_staged(self, loads: Sequence[Load]) -> None:
        """One expert at a time through a host buffer: bytes that need a cast, a scattered landing or another device."""
        assert self._staging is not None
        tensor, host = self._staging
        for load in loads:
            span = self._experts.span(load.key)
            report = self._reader.read(
                [Extent(part.file, part.offset, part.nbytes, host[start:end]) for part, start, end in span.places()]
            )
            self.layout.fill(self.views[load.slot], span, tensor)
            self.residency.landed(load.key)
            self.paged.count(1, report.needed)
            self.paged.bytes_read += report.read
            self.paged.seconds += report.seconds
            self._staged[load.key] = report.seconds

    def _no_room(self, layer: int, missing: int) -> str:
        return (
            f"{missing} experts of MoE layer {layer} must be paged in, but leases hold all {self.residency.slots} "
            "slots. "
            "Exact mode needs at least one free slot: wait for a lease to end, or raise the memory budget."
        )


def _host_buffer(size: int, device: torch.device) -> tuple[torch.Tensor, Bytes]:
    """Host memory that the device can be filled from, as a tensor and as the bytes that reads go into."""
    tensor = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return tensor, np.asarray(tensor.numpy())
