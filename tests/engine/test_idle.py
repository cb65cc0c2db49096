"""Whose slot is given up first: what leases have long not used, what visits paged through, what leases use."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.engine import Engine
from engine.idle import HALF_LIFE, Idle
from engine.requests import Event, FinishedEvent, GenerationRequest
from engine.residency import ABSENT, Residency
from store.records import ExpertKey, Selection

EARLY = Selection.of([[0, 1, 2, 3]] * 3)


def _lease(idle: Idle, *slots: int, cost: float = 0.0) -> None:
    """One request's lease, from its begin to its end."""
    idle.begin_turn()
    for slot in slots:
        idle.discard(slot)
        idle.lease(slot, cost)
    for slot in slots:
        idle.add(slot)


def _order(idle: Idle) -> list[int]:
    """All slots as they are given up."""
    idle.check()
    order = []
    while len(idle):
        order.append(idle.pop())
        idle.forget(order[-1])
        idle.check()
    return order


def test_what_visits_paged_through_goes_before_what_a_lease_used_the_least_recently_used_first() -> None:
    idle = Idle(5)
    _lease(idle, 0, 1)
    for slot in (2, 3, 4):
        idle.add(slot)
    idle.touch(2)
    assert _order(idle)[:3] == [3, 4, 2]


def test_of_what_leases_used_the_one_that_served_fewer_of_late_goes_first() -> None:
    idle = Idle(3)
    _lease(idle, 0, 1)
    _lease(idle, 1)
    _lease(idle, 2)
    assert _order(idle) == [0, 2, 1]


def test_many_leases_long_ago_are_worth_less_than_one_of_late() -> None:
    idle = Idle(2)
    for _ in range(8):
        _lease(idle, 0)
    for _ in range(4 * HALF_LIFE):
        idle.begin_turn()
    _lease(idle, 1)
    assert _order(idle) == [0, 1]


def test_what_no_lease_used_for_many_turns_goes_before_what_visits_use_now() -> None:
    idle = Idle(2)
    _lease(idle, 0)
    idle.add(1)
    for _ in range(2 * HALF_LIFE):
        idle.begin_turn()
    idle.touch(1)
    assert idle.pop() == 1  # not yet
    idle.add(1)
    idle.begin_turn()
    assert idle.pop() == 0


def test_a_visit_to_what_leases_used_keeps_it_as_long_as_a_fresh_lease() -> None:
    idle = Idle(2)
    _lease(idle, 0)
    _lease(idle, 1)
    idle.begin_turn()
    idle.touch(0)
    assert _order(idle) == [1, 0]


def test_of_two_that_served_as_many_leases_the_one_that_costs_less_to_read_again_goes_first() -> None:
    residency = Residency(2, 1, 2, costs=[20, 10])
    wanted = [ExpertKey(0, 0), ExpertKey(1, 0)]
    for load in residency.plan(wanted):
        residency.landed(load.key)
    residency.release(wanted)
    slot = residency.slot(ExpertKey(1, 0))
    assert residency._idle.pop() == slot


def test_a_lease_of_what_a_visit_paged_through_raises_its_rank_and_another_expert_in_its_slot_has_none() -> None:
    residency = Residency(1, 4, 2)
    for expert in (0, 1):
        [load] = residency.plan([ExpertKey(0, expert)], passing=True)
        residency.landed(load.key)
        residency.release([load.key])
    residency.plan([ExpertKey(0, 0)])
    residency.release([ExpertKey(0, 0)])
    for expert in (2, 3, 1):  # each through the one slot that no lease has ever used
        [load] = residency.plan([ExpertKey(0, expert)], passing=True)
        residency.landed(load.key)
        residency.release([load.key])
        assert residency.slot(ExpertKey(0, 0)) != ABSENT
    residency.check()


def test_exact_requests_alone_find_what_they_would_find_in_a_plain_lru() -> None:
    rng, slots = random.Random(0), 12
    residency, lru = Residency(1, 64, slots), OrderedDict[int, None]()
    for turn in range(2000):
        expert = min(int(rng.expovariate(0.1)), 63)
        if turn % 20 == 0:
            residency.begin_turn()
        assert (residency.slot(ExpertKey(0, expert)) != ABSENT) == (expert in lru)
        for load in residency.plan([ExpertKey(0, expert)], passing=True):
            residency.landed(load.key)
        residency.release([ExpertKey(0, expert)])
        lru[expert] = None
        lru.move_to_end(expert)
        if len(lru) > slots:
            lru.popitem(last=False)


def test_an_exact_request_leaves_a_task_that_is_idle_whole(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], ask: Callable[..., GenerationRequest],
    finished: Callable[[Iterator[Event]], dict[int, FinishedEvent]],
) -> None:  # fmt: skip
    folder = checkpoint("qwen2_moe")
    roomy = open_engine(folder, chunk_tokens=64)
    engine = open_engine(folder, chunk_tokens=64, memory=roomy.plan.fixed_bytes + 16 * roomy.plan.slot_bytes)
    assert engine.plan.slots == 16
    with engine.lease(EARLY):
        pass
    done = finished(engine.generate([ask(tuple(range(5, 25)), max_tokens=60, ignore_eos=True)]))
    assert done[0].served.experts_paged > 16  # it had to page a lot through the four slots left
    assert engine.bank.holds(EARLY)
