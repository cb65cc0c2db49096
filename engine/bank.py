"""The experts' memory on the device: one bank of slots for all layers. Executes what the residency decides.

Knows spans and bytes, not routing or text. Owned by one thread. S slots.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from engine.layout import SlotLayout
from engine.reader import Reader
from engine.residency import ABSENT, Load, Residency
from engine.transfer import Bytes, Extent, Transfer
from store.errors import BudgetError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection

BIG = 2**20  # bytes of an expert from which it is awaited by itself; smaller ones are read layer by layer


@dataclass(frozen=True, slots=True)
class Lease:
    """What a lease costs: experts held, how many of them had to be read, from how many bytes."""

    experts: int
    experts_paged: int
    bytes_paged: int
    keys: tuple[ExpertKey, ...]
    delivery: Delivery | None
    waited: float  # seconds from the wish to the lease

    @property
    def seconds(self) -> float:
        """How long the reads took; of a lease that was taken ahead of them, so far."""
        return max(self.waited, 0.0 if self.delivery is None else self.delivery.transfer.seconds)


class Delivery:
    """Loads under way: the transfer's group of each expert that it brings."""

    def __init__(self, transfer: Transfer, groups: Sequence[Sequence[Load]], needed: int) -> None:
        self.transfer, self.needed, self.settled = transfer, needed, False
        self.group = {load.key: group for group, loads in enumerate(groups) for load in loads}


@dataclass(slots=True)
class Paged:
    """Running totals since open. `bytes_read` counts alignment and holes too, `bytes_needed` the experts alone."""

    experts: int = 0
    bytes_needed: int = 0
    bytes_read: int = 0
    seconds: float = 0.0


class Bank:
    """Slots in one allocation, faulted in once. `views[slot]` are the expert's parameters in the layout's order."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, slots: int, device: torch.device, reader: Reader
    ) -> None:
        self.layout = layout
        self.residency = Residency(len(experts.layers), experts.experts, slots)
        self.paged = Paged()
        self._experts = experts
        self._total = len(experts.layers) * experts.experts
        self._reader = reader
        self._arriving: dict[ExpertKey, Delivery] = {}
        self._memory = torch.zeros(slots, layout.slot_bytes, dtype=torch.uint8, device=device)  # [S, slot_bytes]
        self.views = layout.views(self._memory)
        self._direct = layout.direct and device.type == "cpu"
        self._host: Bytes | None = self._memory.numpy() if self._direct else None
        self._staging = None if self._direct else _host_buffer(max(experts.expert_bytes), device)

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes

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
            yield Lease(len(keys), len(loads), size, keys, delivery, time.perf_counter() - started)
        finally:
            self._let_go(keys, delivery)

    def wait(self, lease: Lease) -> None:
        """Until the last expert of a lease that was taken ahead is there. Raises what made a read fail."""
        for key in lease.keys if self.residency.unfilled else ():
            self._await(key)

    def visit(self, layer: int, experts: Sequence[int]) -> Generator[tuple[int, int], None, None]:
        """Each of `experts` once, with its slot: what is there first, while the others are read.

        A slot is good until the next pair is asked for. Raises BudgetError where every slot is leased, CheckpointError
        where a read fails.
        """
        row, residency = self.residency.table[layer], self.residency
        missing = [expert for expert in experts if row[expert] == ABSENT]
        if not missing:
            yield from self._ready(layer, experts)
            return
        present = [expert for expert in experts if row[expert] != ABSENT]
        room = residency.room_beside([ExpertKey(layer, expert) for expert in present])
        if room:
            yield from self._page(layer, present + missing[:room])
            missing = missing[room:]
        else:
            yield from self._ready(layer, present)
        while missing:
            wave, missing = missing[: residency.available], missing[residency.available :]
            if not wave:
                raise BudgetError(self._no_room(layer, len(missing)))
            yield from self._page(layer, wave)

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

    def _page(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        keys = [ExpertKey(layer, expert) for expert in experts]
        _, delivery = self._acquire(keys, ahead=True)
        try:
            yield from self._ready(layer, experts)
        finally:
            self._let_go(keys, delivery)

    def _acquire(self, keys: Collection[ExpertKey], *, ahead: bool) -> tuple[list[Load], Delivery | None]:
        """Pin, and read what nobody else is reading; after a failure all pins are gone."""
        loads = self.residency.plan(keys)
        new = {load.key for load in loads}
        loads += [Load(key, self.residency.slot(key)) for key in keys if key not in new and self._is_lost(key)]
        delivery = None
        try:
            delivery = self._start(loads, urgent=not ahead)
            for key in () if ahead else keys:
                self._await(key)
        except BaseException:
            self._let_go(keys, delivery)
            raise
        return loads, delivery

    def _let_go(self, keys: Collection[ExpertKey], delivery: Delivery | None) -> None:
        """Unpin. Reads that are still under way for these keys are given up; another lease of them reads again."""
        if delivery is not None:
            self._settle(delivery)
        self.residency.release(keys)

    def _is_lost(self, key: ExpertKey) -> bool:
        """Whether the key has a slot, but nobody is reading its bytes any more: they failed, or were given up."""
        return self.residency.slot(key) in self.residency.unfilled and key not in self._arriving

    def _await(self, key: ExpertKey) -> None:
        """Until the bytes of a pinned key are there. A read that failed is over; whoever asks next begins another."""
        slot = self.residency.slot(key)
        if slot not in self.residency.unfilled:
            return
        delivery = self._arriving.get(key) or self._start([Load(key, slot)], urgent=True)
        assert delivery is not None or slot not in self.residency.unfilled, key
        if delivery is None:
            return
        try:
            delivery.transfer.wait(delivery.group[key])
        except BaseException:
            self._settle(delivery)
            raise
        if delivery.transfer.landed:
            self._settle(delivery)
        else:
            self._arrived(key)

    def _start(self, loads: Sequence[Load], *, urgent: bool) -> Delivery | None:
        """Begin to fill the slots; what can't go straight from the file into a slot is read at once."""
        if not loads:
            return None
        if not self._direct:
            self._read_staged(loads)
            return None
        big = min(self._experts.expert_bytes) >= BIG
        groups = [list(group) for _, group in groupby(loads, key=lambda load: load.key if big else load.key.layer)]
        transfer = self._reader.start([self._extents(group) for group in groups], urgent)
        delivery = Delivery(transfer, groups, sum(self._experts.span(load.key).nbytes for load in loads))
        self._arriving.update(dict.fromkeys(delivery.group, delivery))
        self.paged.experts += len(loads)
        self.paged.bytes_needed += delivery.needed
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
                self.paged.experts -= 1
                self.paged.bytes_needed -= self._experts.span(key).nbytes
        if not delivery.settled:
            delivery.settled = True
            self.paged.bytes_read += delivery.transfer.read
            self.paged.seconds += delivery.transfer.seconds

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
            parts, at, extents = self._experts.span(load.key).parts, 0, []
            for part in parts:
                extents.append(Extent(part.file, part.offset, part.nbytes, host[at : at + part.nbytes]))
                at += part.nbytes
            report = self._reader.read(extents)
            at = 0
            for part in parts:
                stored = tensor[at : at + part.nbytes].view(self.layout.stored(part.dtype)).view(part.shape)
                self.layout.target(part.projection, self.views[load.slot]).copy_(stored)
                at += part.nbytes
            self.residency.landed(load.key)
            self.paged.experts += 1
            self.paged.bytes_needed += report.needed
            self.paged.bytes_read += report.read
            self.paged.seconds += report.seconds

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
