"""The experts' memory on the device: one bank of slots for all layers. Executes what the residency decides.

Knows spans and bytes, not routing or text. Owned by one thread. S slots.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from engine.layout import SlotLayout
from engine.reader import Bytes, Extent, Reader
from engine.residency import ABSENT, Load, Residency
from store.errors import BudgetError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection


@dataclass(frozen=True, slots=True)
class Lease:
    """What a lease cost: experts held, how many of them had to be read, from how many bytes, in how long."""

    experts: int
    experts_paged: int
    bytes_paged: int
    seconds: float


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
    def lease(self, selection: Selection) -> Iterator[Lease]:
        """Every expert of `selection` is resident and stays so until the block ends. Only what is missing is read.

        Raises BudgetError where other leases leave too few slots, CheckpointError where a read fails; both leave every
        other lease as it was.
        """
        keys = tuple(selection)
        started = time.perf_counter()
        loads, size = self._acquire(keys)
        try:
            yield Lease(len(keys), len(loads), size, time.perf_counter() - started)
        finally:
            self.residency.release(keys)

    def visit(self, layer: int, experts: Sequence[int]) -> Generator[tuple[int, int], None, None]:
        """Each of `experts` once, with its slot: resident ones first, then the missing ones in waves through free
        slots.

        A slot is good until the next pair is asked for. Raises BudgetError where every slot is leased.
        """
        row, residency = self.residency.table[layer], self.residency
        missing = [expert for expert in experts if row[expert] == ABSENT]
        for expert in experts:
            slot = row[expert]
            if slot != ABSENT:
                residency.touch(slot)
                yield expert, slot
        while missing:
            wave, missing = missing[: residency.available], missing[residency.available :]
            if not wave:
                raise BudgetError(self._no_room(layer, len(missing)))
            yield from self._page(layer, wave)

    def _page(self, layer: int, wave: Sequence[int]) -> Iterator[tuple[int, int]]:
        keys = [ExpertKey(layer, expert) for expert in wave]
        self._acquire(keys)
        try:
            for key in keys:
                yield key.expert, self.residency.slot(key)
        finally:
            self.residency.release(keys)

    def _acquire(self, keys: Collection[ExpertKey]) -> tuple[list[Load], int]:
        """Pin and load; after a failed read the pins are gone and the slots of what did not land are empty."""
        loads = self.residency.plan(keys)
        try:
            return loads, self._read(loads)
        except BaseException:
            lost = {load.key for load in loads}
            for key in lost:
                self.residency.forget(key)
            self.residency.release([key for key in keys if key not in lost])
            raise

    def _read(self, loads: Sequence[Load]) -> int:
        """Fill the slots, in the order of the file. Returns the bytes that were needed."""
        if not loads:
            return 0
        started = time.perf_counter()
        needed, read = self._read_direct(loads) if self._direct else self._read_staged(loads)
        self.paged.experts += len(loads)
        self.paged.bytes_needed += needed
        self.paged.bytes_read += read
        self.paged.seconds += time.perf_counter() - started
        return needed

    def _read_direct(self, loads: Sequence[Load]) -> tuple[int, int]:
        """File bytes are slot bytes: no second copy on the host."""
        assert self._host is not None
        extents = []
        for load in loads:
            slot = self._host[load.slot]
            for part in self._experts.span(load.key).parts:
                start, end = self.layout.byte_range(part.projection)
                extents.append(Extent(part.file, part.offset, part.nbytes, slot[start:end]))
        report = self._reader.read(extents)
        return report.needed, report.read

    def _read_staged(self, loads: Sequence[Load]) -> tuple[int, int]:
        """One expert at a time through a host buffer: bytes that need a cast, a scattered landing or another device."""
        assert self._staging is not None
        needed = read = 0
        for load in loads:
            parts, at, extents = self._experts.span(load.key).parts, 0, []
            for part in parts:
                extents.append(Extent(part.file, part.offset, part.nbytes, self._staging[1][at : at + part.nbytes]))
                at += part.nbytes
            report = self._reader.read(extents)
            at = 0
            for part in parts:
                stored = self._staging[0][at : at + part.nbytes].view(self.layout.stored(part.dtype)).view(part.shape)
                self.layout.target(part.projection, self.views[load.slot]).copy_(stored)
                at += part.nbytes
            needed, read = needed + report.needed, read + report.read
        return needed, read

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
