"""The scheduler: each rule by itself, and a simulated day of four tasks that do not fit together."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from fake_room import FakeRoom

from engine.scheduler import Rules, Scheduler, Waiting
from store.records import Selection

A, B, C, D = (Selection.of([[n]]) for n in range(4))
RULES = Rules(turn_requests=3, turn_seconds=5.0, wait_seconds=20.0, session_seconds=30.0)


def _queue(*jobs: tuple[str, Selection | None], at: float = 0.0, **fields: object) -> Scheduler[str]:
    scheduler: Scheduler[str] = Scheduler(RULES)
    for order, (name, selection) in enumerate(jobs):
        scheduler.add(Waiting(name, selection, at, order, **fields))  # type: ignore[arg-type]
    return scheduler


def _all(scheduler: Scheduler[str], room: FakeRoom, now: float = 0.0) -> list[str]:
    names = []
    while (waiting := scheduler.next(room, now)) is not None:
        names.append(waiting.job)
    return names


def test_settled_requests_go_before_swaps_and_the_oldest_first() -> None:
    scheduler = _queue(("b1", B), ("a1", A), ("b2", B), ("a2", A))
    assert _all(scheduler, FakeRoom({A})) == ["a1", "a2", "b1", "b2"]


def test_a_turn_of_settled_requests_ends_after_so_many() -> None:
    scheduler = _queue(("b1", B), *((f"a{n}", A) for n in range(6)))
    assert _all(scheduler, FakeRoom({A}))[:4] == ["a0", "a1", "a2", "b1"]


def test_a_turn_of_settled_requests_ends_after_so_long() -> None:
    scheduler, room = _queue(("b1", B), ("a1", A), ("a2", A)), FakeRoom({A})
    assert [scheduler.next(room, now).job for now in (0.0, 5.0)] == ["a1", "b1"]  # type: ignore[union-attr]


def test_after_a_turn_nothing_overtakes_a_swap_that_does_not_fit_yet() -> None:
    scheduler = _queue(("b1", B), *((f"a{n}", A) for n in range(6)))
    room = FakeRoom({A}, fitting={A})
    assert _all(scheduler, room) == ["a0", "a1", "a2"]
    room.fitting = None  # what ran has ended
    assert _all(scheduler, room) == ["b1", "a3", "a4", "a5"]


def test_a_request_that_waited_too_long_is_the_next_swap_after_the_turn() -> None:
    scheduler = _queue(("c1", C), ("b1", B), ("b2", B), *((f"a{n}", A) for n in range(6)))
    room = FakeRoom({A}, cost={C: 100.0})
    assert [scheduler.next(room, 20.0).job for _ in range(4)] == ["a0", "a1", "a2", "c1"]  # type: ignore[union-attr]


def test_one_request_is_not_starved_by_an_endless_stream_of_another_task() -> None:
    scheduler, room = _queue(("b", B)), FakeRoom({A})
    admitted = []
    for second in range(20):
        scheduler.add(Waiting(f"a{second}", A, float(second), second + 1))
        room.fitting = None if second % 4 == 0 else {A}  # every four seconds what ran before has ended
        waiting = scheduler.next(room, float(second))
        admitted.append(None if waiting is None else waiting.job)
    assert admitted.index("b") <= RULES.turn_seconds + 4


def test_many_waiting_for_a_cheap_swap_go_before_one_that_waits_for_a_dear_one() -> None:
    room = FakeRoom(cost={A: 1.0, B: 4.0, C: 1.0})
    scheduler = _queue(("b1", B), ("a1", A), ("c1", C), ("c2", C))
    for name, resident in (("c1", C), ("c2", C), ("a1", A), ("b1", B)):
        assert scheduler.next(room, 2.0).job == name  # type: ignore[union-attr]
        room.resident = {resident}


def test_a_small_swap_that_fits_may_go_before_a_better_one_that_does_not() -> None:
    scheduler, room = _queue(("a1", A), ("a2", A), ("b1", B)), FakeRoom(fitting={B})
    assert scheduler.next(room, 1.0).job == "b1"  # type: ignore[union-attr]
    assert scheduler.next(room, 1.0) is None


def test_a_session_that_was_served_lately_goes_first_among_the_settled() -> None:
    scheduler, room = _queue(("x", A), session="s"), FakeRoom({A})
    assert scheduler.next(room, 0.0).job == "x"  # type: ignore[union-attr]
    for order, (name, session) in enumerate((("old", None), ("same", "s"), ("other", "t")), start=1):
        scheduler.add(Waiting(name, A, 1.0, order, session=session))
    assert _all(scheduler, room, 2.0) == ["same", "old", "other"]
    for order, (name, session) in enumerate((("old", None), ("late", "s")), start=4):
        scheduler.add(Waiting(name, A, 1.0, order, session=session))
    assert _all(scheduler, room, 33.0) == ["old", "late"]


def test_while_enough_rows_wait_for_the_disk_swaps_hold_nobody_up() -> None:
    scheduler = _queue(("b1", B), *((f"a{n}", A) for n in range(6)))
    room = FakeRoom({A}, fitting={A}, may_swap=False)
    assert _all(scheduler, room) == [f"a{n}" for n in range(6)]
    room.fitting, room.may_swap = None, True
    assert _all(scheduler, room) == ["b1"]


def test_background_requests_wait_for_their_experts_and_never_cause_a_swap() -> None:
    scheduler = _queue(("b", B), ("a", A), background=True)
    room = FakeRoom({A})
    assert _all(scheduler, room, 10_000.0) == ["a"]
    room.idle = True
    assert _all(scheduler, room) == []
    room.resident = {B}
    assert _all(scheduler, room) == ["b"]


def test_background_requests_are_given_up_when_they_waited_for_too_long_and_no_others_are() -> None:
    scheduler = _queue(("b", B), background=True)
    scheduler.add(Waiting("front", B, 0.0, 1))
    assert scheduler.overdue(RULES.background_seconds - 0.1) == []
    assert [waiting.job for waiting in scheduler.overdue(RULES.background_seconds)] == ["b"]
    assert len(scheduler) == 1
    assert not scheduler.only_background


def test_background_requests_hold_up_no_call() -> None:
    scheduler = _queue(("a", A), background=True)
    assert not scheduler.has_before(5)
    scheduler.add(Waiting("front", B, 0.0, 1))
    assert scheduler.has_before(5)
    assert not scheduler.has_before(1)


def test_background_requests_wait_while_anybody_else_does() -> None:
    scheduler, room = _queue(("a", A), background=True), FakeRoom({A}, fitting={A})
    scheduler.add(Waiting("b", B, 0.0, 1))
    assert scheduler.next(room, 1.0) is None
    room.fitting = None
    assert _all(scheduler, room) == ["b", "a"]


def test_only_what_arrived_before_is_chosen() -> None:
    scheduler, room = _queue(("a1", A), ("a2", A)), FakeRoom({A})
    assert scheduler.next(room, 0.0, before=1).job == "a1"  # type: ignore[union-attr]
    assert scheduler.next(room, 0.0, before=1) is None
    assert scheduler.has_before(2)
    assert not scheduler.has_before(1)


def test_what_is_dropped_is_gone() -> None:
    scheduler = _queue(("a1", A), ("a2", A))
    assert [waiting.job for waiting in scheduler.drop(lambda job: job == "a1")] == ["a1"]
    assert _all(scheduler, FakeRoom({A})) == ["a2"]


@pytest.mark.parametrize("seed", range(50))
def test_an_idle_room_always_gets_something(seed: int) -> None:
    rng, scheduler = random.Random(seed), Scheduler[int](RULES)
    for order in range(20):
        scheduler.add(Waiting(order, rng.choice((A, B, None)), rng.uniform(0, 50), order, background=False))
    for left in range(20, 0, -1):
        room = FakeRoom(set(rng.sample((A, B, None), 1)), fitting=set(), idle=True)
        assert len(scheduler) == left
        assert scheduler.next(room, 60.0) is not None


@dataclass
class _Day:
    """Requests of four tasks, of which the device holds one at a time; four rows, a second each, a swap takes two."""

    swaps: int = 0
    longest_wait: float = 0.0
    ended: float = 0.0


def _simulate(choose: Callable[[Scheduler[float], FakeRoom, float], Waiting[float] | None], seed: int) -> _Day:
    rng, scheduler, day = random.Random(seed), Scheduler[float](Rules(8, 3.0, 30.0)), _Day()
    arrivals = sorted((rng.uniform(0, 100), rng.choice((A, A, A, B, B, C, D))) for _ in range(200))
    resident, running, now = None, [], 0.0
    order = iter(range(1000))
    while arrivals or len(scheduler) or running:
        while arrivals and arrivals[0][0] <= now:
            when, selection = arrivals.pop(0)
            scheduler.add(Waiting(when, selection, when, next(order)))
        running = [end for end in running if end > now]
        room = FakeRoom({resident}, {resident} if running else None, not running, dict.fromkeys((A, B, C, D), 2.0))
        if len(running) < 4 and (waiting := choose(scheduler, room, now)) is not None:
            if waiting.selection != resident:
                resident, day.swaps, now = waiting.selection, day.swaps + 1, now + 2.0
            day.longest_wait = max(day.longest_wait, now - waiting.submitted)
            running.append(now + 1.0)
        else:
            now += 0.1
    day.ended = now
    return day


def _first_come(scheduler: Scheduler[float], room: FakeRoom, now: float) -> Waiting[float] | None:
    oldest = min(scheduler._queue, key=lambda waiting: waiting.order, default=None)
    if oldest is None or not (room.idle or room.fits(oldest.selection)):
        return None
    scheduler._queue.remove(oldest)
    return oldest


@pytest.mark.parametrize("seed", range(5))
def test_a_day_of_four_tasks_takes_a_fraction_of_the_swaps_and_of_the_waiting(seed: int) -> None:
    ours = _simulate(lambda scheduler, room, now: scheduler.next(room, now), seed)
    plain = _simulate(_first_come, seed)
    assert ours.swaps < plain.swaps / 3
    assert ours.ended < plain.ended / 2
    assert ours.longest_wait < plain.longest_wait / 2
