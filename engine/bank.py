"""The experts' memory on the device: one bank of slots for all layers. Leases them and shows them to who computes.

The residency decides what is where, the arrivals bring the bytes. Knows no routing and no text. Owned by one thread. S
slots.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.arrivals import Arrivals, Interrupted
from engine.delivery import Delivery
from engine.guesses import Guesses
from engine.layout import SlotLayout
from engine.reader import Reader
from engine.residency import ABSENT, NOBODY, Load, Residency
from engine.unpacking import Unpacked
from store.errors import BudgetError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection


@dataclass(slots=True)
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
        return max(self.waited, 0.0 if self.delivery is None else self.delivery.passage.seconds)

    def __hash__(self) -> int:
        return id(self)


class Bank:
    """Slots in one allocation, faulted in once."""

    def __init__(
        self, layout: SlotLayout, experts: ExpertMap, slots: int, device: torch.device, reader: Reader,
        read_ahead: int = 0,
    ) -> None:  # fmt: skip
        """`read_ahead` is how many experts at most are read on a guess at a time."""
        self.layout = layout
        self.residency = Residency(len(experts.layers), experts.experts, slots, experts.expert_bytes)
        self.expert_bytes: Sequence[int] = experts.expert_bytes  # of one expert in the file, per layer
        self._total = len(experts.layers) * experts.experts
        self.memory = torch.zeros(slots, layout.slot_bytes, dtype=torch.uint8, device=device)  # [S, slot_bytes]
        self._views = layout.views(self.memory)
        self._unpacked = Unpacked()
        self.arrivals = Arrivals(layout, experts, self.memory, self._views, self.residency, reader)
        self.paged = self.arrivals.paged
        self.guesses = Guesses(self.residency, read_ahead, self._begin_guess, lambda key, _: self.let_go([key]))

    def weights(self, slot: int) -> tuple[Tensor, ...]:
        """The expert's parameters in the layout's order; quantised ones are good until another slot's are asked."""
        views = self._views[slot]
        return self.layout.weights(views, self._unpacked) if self.layout.packed else views

    @property
    def slot_bytes(self) -> int:
        return self.layout.slot_bytes

    @property
    def resident_bytes(self) -> int:
        return self.residency.resident * self.slot_bytes

    @property
    def reaches_all(self) -> bool:
        """Whether any expert can be visited now: all are here, or there is a slot to page through."""
        return self.residency.available > 0 or self.whole

    @property
    def whole(self) -> bool:
        """Whether every expert of the model is resident."""
        return self.residency.resident == self._total

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
            size = self.arrivals.nbytes(load.key for load in loads)
            waited = time.perf_counter() - started
            yield Lease(len(keys), len(loads), size, keys, delivery, waited)
        finally:
            self.let_go(keys)

    def wait(self, lease: Lease) -> None:
        """Until the last expert of a lease that was taken ahead is there. Raises what made a read fail."""
        for key in lease.keys if self.residency.unfilled else ():
            self.arrivals.wait_for(key)

    def work(self) -> None:
        """Some of what only the owner can do for experts that are on their way, whoever wants them: a slice of time.

        At a token boundary, once, however many leases wait.
        """
        if self.residency.unfilled:
            self.arrivals.work()

    def poll(self, lease: Lease, seconds: float = 0.0) -> bool:
        """Whether all experts of a lease that was taken ahead are there, after waiting for at most `seconds`.

        Reads that somebody else gave up are begun anew. Without `seconds` nothing comes that needs the owner's work,
        see `work`. Raises what made a read fail.
        """
        return self.bring(lease.keys, seconds)

    def bring(self, keys: Sequence[ExpertKey], seconds: float = 0.0) -> bool:
        """As `poll`, of `keys` that somebody has pinned."""
        missing = self._missing(keys)
        if not missing:
            return True
        self.arrivals.look_after(missing)
        if lost := [Load(key, self.residency.slot(key)) for key in missing if self.arrivals.is_lost(key)]:
            self.arrivals.begin(lost, urgent=False)
        missing = self._missing(keys)
        if seconds and missing and self.arrivals.is_under_way(missing[-1]):
            self.arrivals.wait_for(missing[-1], seconds)
            missing = self._missing(keys)
        return not missing

    def let_go(self, keys: Collection[ExpertKey]) -> None:
        """Unpin: of a lease that ends, or of a visit that has ended or was broken off."""
        self.arrivals.give_up(keys)
        self.residency.release(keys)

    def holds(self, keys: Iterable[ExpertKey]) -> bool:
        """Whether all of them are in memory, to the last byte."""
        residency = self.residency
        slots = [residency.slot(key) for key in keys]
        return ABSENT not in slots and residency.unfilled.isdisjoint(slots)

    def missing_bytes(self, lease: Lease) -> int:
        """What has still to come of a lease that was taken ahead."""
        return self.arrivals.nbytes(self._missing(lease.keys))

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
        where a read fails, Interrupted where the wait for one is broken off. What `guesses` expects of the next layer
        begins to be read once all of `experts` have slots.
        """
        for delivery in self.guesses.judge(layer, experts):
            self.arrivals.hurry(delivery)
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
        here = not missing and residency.unfilled.isdisjoint(row[expert] for expert in experts)
        if here and not self.guesses.useful:
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
                self.arrivals.wait_for(ExpertKey(layer, expert))
            residency.touch(slot)
            yield expert, slot

    def _page(self, layer: int, experts: Sequence[int], *, last: bool) -> Iterator[tuple[int, int]]:
        keys = [ExpertKey(layer, expert) for expert in experts]
        self._acquire(keys, ahead=True, visit=True)
        pinned = keys
        try:
            if last:
                self.guesses.begin()
            yield from self._ready(layer, experts)
        except Interrupted as broken:
            broken.keys, pinned = keys, []
            raise
        finally:
            self.let_go(pinned)

    def _begin_guess(self, key: ExpertKey) -> Delivery:
        """A transfer of its own, so that it can be given up alone."""
        loads = self.residency.plan([key], passing=True)
        try:
            delivery = self.arrivals.begin(loads, urgent=False, guess=True)
        except BaseException:
            self.residency.release([key])
            raise
        assert delivery is not None, key
        return delivery

    def _acquire(
        self, keys: Collection[ExpertKey], *, ahead: bool, visit: bool = False
    ) -> tuple[list[Load], Delivery | None]:
        """Pin, and read what nobody else is reading; after a failure all pins are gone."""
        loads = self.residency.plan(keys, passing=visit)
        new = {load.key for load in loads}
        loads += [Load(key, self.residency.slot(key)) for key in keys if key not in new and self.arrivals.is_lost(key)]
        delivery = None
        try:
            delivery = self.arrivals.begin(loads, urgent=visit or not ahead)
            for key in () if ahead else keys:
                self.arrivals.wait_for(key)
        except BaseException:
            self.let_go(keys)
            raise
        return loads, delivery

    def _missing(self, keys: Iterable[ExpertKey]) -> list[ExpertKey]:
        unfilled, residency = self.residency.unfilled, self.residency
        return [key for key in keys if residency.slot(key) in unfilled] if unfilled else []

    def _no_room(self, layer: int, missing: int) -> str:
        return (
            f"{missing} experts of MoE layer {layer} must be paged in, but leases hold all {self.residency.slots} "
            "slots. "
            "Exact mode needs at least one free slot: wait for a lease to end, or raise the memory budget."
        )
