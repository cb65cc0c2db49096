"""Whose slot is given up first: what few requests used of late, but not what visits use at this moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from engine.engine import Engine
from engine.idle import HALF_LIFE, Idle
from engine.requests import Event, FinishedEvent, GenerationRequest
from engine.residency import ABSENT, Residency
from store.records import ExpertKey, Selection

EARLY = Selection.of([[0, 1, 2, 3]] * 3)


A, B, C, D, E = (ExpertKey(0, expert) for expert in range(5))


def _lease(idle: Idle, *keys: ExpertKey, cost: float = 0.0) -> None:
    """One request's lease, from its begin to its end."""
    idle.begin_turn()
    for key in keys:
        idle.discard(key)
        idle.lease(key, cost)
    for key in keys:
        idle.add(key)


def _visit(idle: Idle, *keys: ExpertKey) -> None:
    """One token of an exact request."""
    for key in keys:
        idle.discard(key)
        idle.visit(key, 0.0)
        idle.add(key)


def _order(idle: Idle) -> list[ExpertKey]:
    """All that is idle as it is given up."""
    idle.check()
    order = []
    while len(idle):
        order.append(idle.pop())
        idle.check()
    return order


def test_of_what_leases_used_the_one_that_served_fewer_of_late_goes_first() -> None:
    idle = Idle(3)
    _lease(idle, A, B)
    _lease(idle, B)
    _lease(idle, C)
    assert _order(idle) == [A, C, B]


def test_many_leases_long_ago_are_worth_less_than_one_of_late() -> None:
    idle = Idle(2)
    for _ in range(8):
        _lease(idle, A)
    for _ in range(4 * HALF_LIFE):
        idle.begin_turn()
    _lease(idle, B)
    assert _order(idle) == [A, B]


def test_a_request_that_visits_an_expert_counts_as_much_as_one_that_leases_it_however_many_tokens_it_has() -> None:
    idle = Idle(3)
    _lease(idle, A)
    _lease(idle, A, B)
    idle.begin_turn()
    for _ in range(20):
        _visit(idle, B, C)
    idle.begin_turn()
    assert _order(idle) == [C, A, B]


def test_what_the_present_turns_visits_used_goes_last_the_least_recently_used_first() -> None:
    idle = Idle(4)
    for _ in range(3):
        _lease(idle, A)
    idle.begin_turn()
    _visit(idle, B, C, D)
    _visit(idle, B)
    assert _order(idle) == [A, C, D, B]


def test_no_more_than_three_quarters_of_the_slots_are_spared() -> None:
    idle = Idle(4)
    for _ in range(3):
        _lease(idle, A)
    idle.begin_turn()
    _visit(idle, B, C, D, E)
    assert _order(idle) == [B, A, C, D, E]


def test_when_the_next_request_begins_what_visits_used_is_spared_no_more() -> None:
    idle = Idle(4)
    for _ in range(3):
        _lease(idle, A)
    idle.begin_turn()
    _visit(idle, B, C)
    idle.begin_turn()
    assert _order(idle) == [B, C, A]


def test_of_equals_the_least_recently_used_goes_first() -> None:
    idle = Idle(4)
    idle.begin_turn()
    _visit(idle, C, A, B, C)
    idle.begin_turn()
    assert _order(idle) == [A, B, C]


def test_uses_are_remembered_of_an_expert_that_was_given_up() -> None:
    idle = Idle(2)
    for _ in range(3):
        _lease(idle, A)
    assert idle.pop() == A
    _lease(idle, A)
    _lease(idle, B)
    _lease(idle, B)
    assert _order(idle) == [B, A]


def test_of_two_that_served_as_many_leases_the_one_that_costs_less_to_read_again_goes_first() -> None:
    residency = Residency(2, 1, 2, costs=[20, 10])
    wanted = [ExpertKey(0, 0), ExpertKey(1, 0)]
    for load in residency.plan(wanted):
        residency.landed(load.key)
    residency.release(wanted)
    assert residency._idle.pop() == ExpertKey(1, 0)


def test_a_lease_of_what_a_visit_paged_through_raises_its_rank() -> None:
    residency = Residency(1, 4, 2)
    for expert in (0, 1):
        residency.begin_turn()
        [load] = residency.plan([ExpertKey(0, expert)], passing=True)
        residency.landed(load.key)
        residency.release([load.key])
    residency.plan([ExpertKey(0, 0)])
    residency.release([ExpertKey(0, 0)])
    for expert in (2, 3, 1):  # each through the one slot that no lease has ever used
        residency.begin_turn()
        [load] = residency.plan([ExpertKey(0, expert)], passing=True)
        residency.landed(load.key)
        residency.release([load.key])
        assert residency.slot(ExpertKey(0, 0)) != ABSENT
    residency.check()


def test_what_a_masked_row_uses_under_its_lease_is_no_visit() -> None:
    residency = Residency(1, 4, 3)
    for load in residency.plan([ExpertKey(0, 0), ExpertKey(0, 1)]):
        residency.landed(load.key)
    residency.touch(residency.slot(ExpertKey(0, 0)))
    residency.plan([ExpertKey(0, 0)], passing=True)
    residency.release([ExpertKey(0, 0)])
    residency.release([ExpertKey(0, 0), ExpertKey(0, 1)])
    assert residency._idle.pop() == ExpertKey(0, 0)  # not spared, and as much worth as the other


def test_when_an_exact_request_begins_what_the_one_before_it_used_is_spared_no_more(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], ask: Callable[..., GenerationRequest],
    finished: Callable[[Iterator[Event]], dict[int, FinishedEvent]],
) -> None:  # fmt: skip
    engine = open_engine(checkpoint("qwen2_moe"))
    with engine.lease(EARLY):
        pass
    with engine.lease(EARLY):
        pass
    finished(engine.generate([ask((5, 6, 7), max_tokens=1)]))
    idle = engine.bank.residency._idle
    visited = set(idle._spared)
    assert visited
    finished(engine.generate([ask((5,), max_tokens=1)]))
    assert set(idle._spared) < visited
