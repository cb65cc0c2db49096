"""The slot table: pins, eviction order, roll back; then a state machine against a plain model of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.idle import SPARED
from engine.residency import ABSENT, Load, Residency
from store.errors import BudgetError
from store.records import ExpertKey

LAYERS, EXPERTS, SLOTS = 3, 4, 7


def _keys(*pairs: tuple[int, int]) -> list[ExpertKey]:
    return [ExpertKey(*pair) for pair in pairs]


def _plan(residency: Residency, keys: Collection[ExpertKey], *, passing: bool = False) -> list[Load]:
    """A plan whose bytes land."""
    loads = residency.plan(keys, passing=passing)
    for load in loads:
        residency.landed(load.key)
    return loads


def test_a_resident_expert_is_not_loaded_again() -> None:
    residency = Residency(2, 4, 4)
    first = _plan(residency, _keys((0, 1), (1, 2)))
    second = _plan(residency, _keys((0, 1), (1, 3)))
    assert [load.key for load in first] == _keys((0, 1), (1, 2))
    assert [load.key for load in second] == _keys((1, 3))
    residency.check()


def test_of_experts_that_visits_paged_through_the_least_recently_used_is_evicted() -> None:
    residency = Residency(1, 8, 3)
    for expert in (0, 1, 2):
        _plan(residency, _keys((0, expert)), passing=True)
        residency.release(_keys((0, expert)))
    residency.touch(residency.slot(ExpertKey(0, 0)))
    _plan(residency, _keys((0, 5)))
    assert residency.slot(ExpertKey(0, 1)) == ABSENT
    assert residency.slot(ExpertKey(0, 0)) != ABSENT


def test_a_leased_expert_is_never_evicted() -> None:
    residency = Residency(1, 8, 2)
    _plan(residency, _keys((0, 0)))
    slot = residency.slot(ExpertKey(0, 0))
    for expert in range(1, 8):
        _plan(residency, _keys((0, expert)))
        residency.release(_keys((0, expert)))
    assert residency.slot(ExpertKey(0, 0)) == slot


def test_a_lease_that_does_not_fit_changes_nothing() -> None:
    residency = Residency(1, 8, 4)
    _plan(residency, _keys((0, 0), (0, 1)))
    _plan(residency, _keys((0, 2)))
    residency.release(_keys((0, 2)))
    before = (list(residency.table[0]), residency.available, residency.leased)
    with pytest.raises(BudgetError, match="3 need a slot, but only 1 of the 4 slots"):
        _plan(residency, _keys((0, 2), (0, 3), (0, 4), (0, 5)))
    assert (list(residency.table[0]), residency.available, residency.leased) == before
    residency.check()


def test_a_resident_expert_that_is_wanted_does_not_count_as_room_for_the_missing() -> None:
    residency = Residency(1, 8, 2)
    _plan(residency, _keys((0, 0)))
    residency.release(_keys((0, 0)))
    with pytest.raises(BudgetError):
        _plan(residency, _keys((0, 0), (0, 1), (0, 2)))
    assert residency.slot(ExpertKey(0, 0)) != ABSENT


def test_a_load_that_never_landed_leaves_its_slot_empty() -> None:
    residency = Residency(1, 4, 2)
    residency.plan(_keys((0, 3)))
    residency.release(_keys((0, 3)))
    assert residency.slot(ExpertKey(0, 3)) == ABSENT
    assert residency.available == 2
    residency.check()


def test_a_load_under_way_stays_for_those_who_still_want_it() -> None:
    residency = Residency(1, 4, 2)
    residency.plan(_keys((0, 3)))
    assert residency.plan(_keys((0, 3))) == []
    residency.release(_keys((0, 3)))
    assert residency.unfilled == {residency.slot(ExpertKey(0, 3))}
    residency.landed(ExpertKey(0, 3))
    residency.release(_keys((0, 3)))
    assert residency.slot(ExpertKey(0, 3)) != ABSENT
    residency.check()


def test_room_beside_experts_that_are_wanted_excludes_their_slots() -> None:
    residency = Residency(1, 8, 4)
    _plan(residency, _keys((0, 0), (0, 1)))
    residency.release(_keys((0, 0)))
    assert residency.room_beside(_keys((0, 0))) == 2
    assert residency.room_beside(_keys((0, 1))) == 3


KEYS = st.builds(ExpertKey, st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1))


class ResidencyMachine(RuleBasedStateMachine):
    """Leases and visits come and go, loads fail; the model is a counter of pins, the set of what is resident, and what
    visits used since the last lease, the most recent last."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(LAYERS, EXPERTS, SLOTS)
        self.leases: list[frozenset[ExpertKey]] = []
        self.resident: set[ExpertKey] = set()
        self.visited: list[ExpertKey] = []

    def pins(self) -> Counter[ExpertKey]:
        return Counter(key for lease in self.leases for key in lease)

    @rule(wanted=st.frozensets(KEYS, min_size=1, max_size=SLOTS + 1))
    def lease(self, wanted: frozenset[ExpertKey]) -> None:
        fits = len(wanted | self.pins().keys()) <= SLOTS
        try:
            loads = self.residency.plan(wanted)
        except BudgetError:
            assert not fits
            return
        assert fits
        assert {load.key for load in loads} == wanted - self.resident
        assert len({load.slot for load in loads}) == len(loads)
        for load in loads:
            self.residency.landed(load.key)
        self.visited.clear()
        self.sync(wanted)
        self.leases.append(wanted)

    @rule(wanted=st.frozensets(KEYS, min_size=1, max_size=3))
    def visit(self, wanted: frozenset[ExpertKey]) -> None:
        try:
            loads = self.residency.plan(wanted, passing=True)
        except BudgetError:
            assert len(wanted | self.pins().keys()) > SLOTS
            return
        for load in loads:
            self.residency.landed(load.key)
        self.residency.release(wanted)
        self.see(wanted)
        self.sync(wanted)
        assert wanted <= self.resident

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.residency.release(lease)

    @rule(wanted=st.frozensets(KEYS, min_size=1, max_size=3))
    def lease_whose_read_fails(self, wanted: frozenset[ExpertKey]) -> None:
        try:
            loads = self.residency.plan(wanted)
        except BudgetError:
            return
        self.residency.release(wanted)
        assert all(self.residency.slot(load.key) == ABSENT for load in loads)
        self.visited.clear()
        self.sync(wanted)

    @rule(key=KEYS)
    def touch(self, key: ExpertKey) -> None:
        if self.residency.slot(key) != ABSENT:
            self.residency.touch(self.residency.slot(key))
            self.see([key])

    @rule()
    def evict_idle(self) -> None:
        self.residency.evict_idle()
        self.sync(self.resident)
        assert self.resident == set(self.pins())

    def see(self, keys: Collection[ExpertKey]) -> None:
        """A visit uses `keys`; leases speak for those that they hold."""
        for key in sorted(set(keys) - self.pins().keys()):
            if key in self.visited:
                self.visited.remove(key)
            self.visited.append(key)

    def sync(self, wanted: Collection[ExpertKey]) -> None:
        """While `wanted` came in, what visits used of late went only where nothing else could go."""
        rows, before = enumerate(self.residency.table), self.resident
        self.resident = {ExpertKey(layer, e) for layer, row in rows for e, slot in enumerate(row) if slot != ABSENT}
        spared = set(self.visited[-int(SPARED * SLOTS) :])
        others = before & self.resident - spared - self.pins().keys() - set(wanted)
        assert not others or not spared & (before - self.resident)
        self.visited = [key for key in self.visited if key in self.resident]

    @invariant()
    def everything_leased_is_resident_and_the_table_is_sound(self) -> None:
        self.residency.check()
        assert self.pins().keys() <= self.resident
        assert self.residency.leased == len(self.pins())
        assert self.residency.available == SLOTS - len(self.pins())


ResidencyMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestResidency = ResidencyMachine.TestCase
