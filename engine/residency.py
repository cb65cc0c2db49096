"""Which expert is in which slot: pins, and whose slot is taken. Decides only; knows no tensors and reads no bytes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from math import log2
from typing import NamedTuple

from engine.idle import Idle
from store.errors import BudgetError
from store.records import ExpertKey

ABSENT = -1
NOBODY = -2  # in place of a slot, for a choice that no expert gets


class Load(NamedTuple):
    """An expert that must be read into a slot before it can be used."""

    key: ExpertKey
    slot: int


class Residency:
    """One table for all layers: any slot may hold any expert. Not thread-safe: the device's owner calls it.

    `table[layer][expert]` is the slot or ABSENT, kept as plain lists because every decoded token reads it. A slot whose
    bytes are still under way is `unfilled`: it has its key and its pins, and is emptied if the last pin goes first.
    """

    def __init__(self, layers: int, experts: int, slots: int, costs: Sequence[float] = ()) -> None:
        """`costs` is what reading an expert takes, per layer, in any unit: without it, the same in all."""
        self.slots = slots
        self.table: list[list[int]] = [[ABSENT] * experts for _ in range(layers)]
        self._keys: list[ExpertKey | None] = [None] * slots
        self._pins = [0] * slots
        self._empty = list(range(slots - 1, -1, -1))
        self.unfilled: set[int] = set()
        self._idle = Idle(slots)  # filled and unpinned
        self._costs = [log2(cost / max(costs)) for cost in costs] or [0.0] * layers

    @property
    def available(self) -> int:
        """Slots that a new expert could take: empty ones and those whose expert nobody leases."""
        return len(self._empty) + len(self._idle)

    @property
    def resident(self) -> int:
        return self.slots - len(self._empty)

    @property
    def leased(self) -> int:
        return self.slots - self.available

    def is_leased(self, slot: int) -> bool:
        return self._pins[slot] > 0

    def is_last(self, key: ExpertKey) -> bool:
        """Whether a single lease holds the key's slot."""
        return self._pins[self.slot(key)] == 1

    def room_beside(self, keys: Collection[ExpertKey]) -> int:
        """Slots that new experts could take while `keys`, all resident, are pinned."""
        return self.available - sum(key in self._idle for key in keys)

    def slot(self, key: ExpertKey) -> int:
        return self.table[key.layer][key.expert]

    def unpinned(self, wanted: Iterable[ExpertKey]) -> int:
        """How many of `wanted` no lease holds: each would take one of the available slots."""
        slots = (self.table[key.layer][key.expert] for key in wanted)
        return sum(slot == ABSENT or not self._pins[slot] for slot in slots)

    def plan(self, wanted: Collection[ExpertKey], *, passing: bool = False) -> list[Load]:
        """Pin `wanted` and return the loads that make all of it resident. Changes nothing if it raises BudgetError.

        For a lease or, `passing`, for one visit: that tells when they will be given up (engine/idle.py).
        """
        keys = sorted(set(wanted))
        present = [key for key in keys if self.slot(key) != ABSENT]
        missing = [key for key in keys if self.slot(key) == ABSENT]
        room = self.room_beside(present)
        if len(missing) > room:
            raise BudgetError(
                f"{len(keys)} experts were asked for, {len(present)} of them are resident and {len(missing)} need a "
                "slot, "
                f"but only {room} of the {self.slots} slots are free: leases of other requests hold {self.leased}. "
                "Wait for them to end, use a smaller selection, or raise the memory budget."
            )
        if passing:
            self._visit([key for key in keys if key in self._idle or self.slot(key) == ABSENT])
        else:
            self._lease(keys)
        for key in present:
            self._pin(key)
        return [Load(key, self._take(key)) for key in missing]

    def landed(self, key: ExpertKey) -> None:
        """The bytes of a planned load are there."""
        slot = self.slot(key)
        assert self._pins[slot] > 0, key
        self.unfilled.discard(slot)

    def release(self, wanted: Collection[ExpertKey]) -> None:
        """Undo one `plan` of these keys.

        They stay resident, as used just now, until their slots are needed; what never landed goes at once.
        """
        for key in sorted(set(wanted)):
            slot = self.slot(key)
            assert slot != ABSENT, key
            assert self._pins[slot] > 0, key
            self._pins[slot] -= 1
            if self._pins[slot]:
                continue
            if slot in self.unfilled:
                self._clear(slot)
                self._empty.append(slot)
            else:
                self._idle.add(key)

    def touch(self, slot: int) -> None:
        """A visit uses the slot's expert. Where it is leased, its lease speaks for it."""
        key = self._keys[slot]
        if not self._pins[slot] and key is not None:
            self._idle.visit(key, self._costs[key.layer])

    def begin_turn(self) -> None:
        """A request begins that takes no lease. A lease is a turn by itself."""
        self._idle.begin_turn()

    def evict_idle(self) -> int:
        """Empty every slot that no lease holds; gives their number."""
        count = len(self._idle)
        while self._idle:
            self._empty.append(self._evict())
        return count

    def check(self) -> None:
        """Assert that table, slots, pins and queues tell the same story."""
        for slot, key in enumerate(self._keys):
            assert (key is None) == (slot in self._empty), (slot, key)
            assert key is None or self.slot(key) == slot, (slot, key)
            assert key is None or (key in self._idle) == (self._pins[slot] == 0), (slot, key)
            assert self._pins[slot] >= 0, slot
            assert slot not in self.unfilled or self._pins[slot] > 0, slot
        filled = sum(slot != ABSENT for row in self.table for slot in row)
        assert filled == self.resident, (filled, self.resident)
        assert len(self._idle) == sum(key is not None and not self._pins[slot] for slot, key in enumerate(self._keys))
        assert len(set(self._empty)) == len(self._empty)
        self._idle.check()

    def _pin(self, key: ExpertKey) -> None:
        self._pins[self.slot(key)] += 1
        self._idle.discard(key)

    def _lease(self, keys: Iterable[ExpertKey]) -> None:
        self._idle.begin_turn()
        for key in keys:
            self._idle.lease(key, self._costs[key.layer])

    def _visit(self, keys: Iterable[ExpertKey]) -> None:
        for key in keys:
            self._idle.visit(key, self._costs[key.layer])

    def _take(self, key: ExpertKey) -> int:
        slot = self._empty.pop() if self._empty else self._evict()
        self.table[key.layer][key.expert] = slot
        self._keys[slot] = key
        self._pins[slot] = 1
        self.unfilled.add(slot)
        return slot

    def _evict(self) -> int:
        slot = self.slot(self._idle.pop())
        self._clear(slot)
        return slot

    def _clear(self, slot: int) -> None:
        key = self._keys[slot]
        assert key is not None, slot
        self.table[key.layer][key.expert] = ABSENT
        self._keys[slot] = None
        self.unfilled.discard(slot)
