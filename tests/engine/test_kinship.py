"""Kinship in the scheduler: who goes first where many wait, how it is bounded, and what it leaves alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, count
from math import inf
from pathlib import Path

import pytest
from fake_room import FakeRoom
from hypothesis import given
from hypothesis import strategies as st

from engine.admission import LAYER_BYTES
from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest
from engine.scheduler import Rules, Scheduler, Waiting
from engine.worker import EngineWorker
from store.records import Selection

A, B, C = (Selection.of([[n, n + 1]]) for n in (0, 10, 20))
NEAR = Selection.of([[0, 2]])  # one expert of A, one that A has not
RULES = Rules(turn_requests=3, turn_seconds=5.0, wait_seconds=20.0, kin_requests=3, kin_share=0)
TASKS = (A, B, C, None)


def _queue(*selections: Selection | None, rules: Rules = RULES, **fields: object) -> Scheduler[str]:
    """Requests that are called by their places, the first of which was admitted."""
    scheduler: Scheduler[str] = Scheduler(rules)
    for order, selection in enumerate(selections):
        scheduler.add(Waiting(str(order), selection, 0.0, order, **fields))  # type: ignore[arg-type]
    assert scheduler.next(_room(), 0.0).job == "0"  # type: ignore[union-attr]
    return scheduler


def _room(**fields: object) -> FakeRoom:
    return FakeRoom({*TASKS, NEAR}, free_rows=1, **fields)  # type: ignore[arg-type]


def _all(scheduler: Scheduler[str], room: FakeRoom, now: float = 0.0) -> str:
    jobs = []
    while (waiting := scheduler.next(room, now)) is not None:
        jobs.append(waiting.job)
    return " ".join(jobs)


def test_kin_of_what_was_admitted_last_go_first_and_then_the_oldest_leads() -> None:
    assert _all(_queue(A, B, C, A, B, A), _room()) == "3 5 1 4 2"


def test_where_everybody_finds_a_row_the_oldest_go_first() -> None:
    room = _room()
    room.free_rows = 5
    assert _all(_queue(A, B, C, A, B, A), room) == "1 2 3 4 5"


def test_where_nothing_runs_the_oldest_goes_first() -> None:
    assert _all(_queue(A, B, A), _room(idle=True)) == "1 2"


def test_nobody_is_overtaken_by_more_kin_than_so_many() -> None:
    assert _all(_queue(A, B, A, A, A, A, A), _room()) == "2 3 4 1 5 6"


def test_once_one_was_overtaken_enough_whoever_is_older_goes_first_too() -> None:
    scheduler, room = _queue(A, B, C, A, A, A, A), _room()
    assert [scheduler.next(room, 0.0).job for _ in range(3)] == ["3", "4", "5"]  # type: ignore[union-attr]
    assert _all(scheduler, room) == "1 2 6"


def test_nobody_is_overtaken_by_kin_for_longer_than_so_many_seconds() -> None:
    scheduler, room = _queue(A, B, A, A), _room()
    assert [scheduler.next(room, now).job for now in (1.0, 21.0)] == ["2", "1"]  # type: ignore[union-attr]


@pytest.mark.parametrize(("kin_share", "order"), [(0.4, "1 3 2 4"), (0.5, "2 1 3 4"), (1, "1 2 3 4"), (inf, "1 2 3 4")])
def test_kin_is_who_adds_no_more_than_such_a_share_of_bytes(kin_share: float, order: str) -> None:
    assert _all(_queue(A, B, NEAR, B, C, rules=replace(RULES, kin_share=kin_share)), _room()) == order


def test_exact_requests_are_nobodys_kin() -> None:
    assert _all(_queue(None, A, None, A, B), _room()) == "1 3 2 4"
    assert _all(_queue(A, None, A, B), _room()) == "2 1 3"


def test_a_session_that_was_served_lately_goes_before_kin() -> None:
    scheduler = _queue(A, A, B)
    scheduler.add(Waiting("first", C, 0.0, 3, session="s"))
    scheduler._sessions["s"] = 0.0
    assert _all(scheduler, _room(), 1.0).split()[0] == "first"


def test_kin_go_before_others_that_are_there_and_not_before_a_swap_whose_turn_it_is() -> None:
    scheduler, room = _queue(A, C, B, A, A), _room()
    room.resident = {A, B}
    assert [scheduler.next(room, now).job for now in (0.0, 5.0)] == ["3", "1"]  # type: ignore[union-attr]


def test_who_does_not_fit_is_overtaken_by_nobody_until_it_does() -> None:
    scheduler, room = _queue(A, B, *[A] * 5), _room(fitting={A})
    assert _all(scheduler, room) == "2 3 4 5 6"
    for order in range(7, 12):
        scheduler.add(Waiting(str(order), A, 0.0, order))
    room.fitting = None
    assert _all(scheduler, room) == "7 8 9 1 10 11"


def test_of_who_has_gone_nothing_is_remembered() -> None:
    scheduler, room = _queue(A, B, C, A, A), _room()
    assert [scheduler.next(room, 0.0).job for _ in range(2)] == ["3", "4"]  # type: ignore[union-attr]
    assert {waiting.job for waiting in scheduler._overtaken} == {"1", "2"}
    assert scheduler.next(room, 0.0).job == "1"  # type: ignore[union-attr]
    scheduler.drop(lambda job: job == "2")
    assert not scheduler._overtaken


def test_background_requests_have_no_kin_in_front() -> None:
    scheduler = _queue(A, B, C)
    scheduler.add(Waiting("behind", A, 0.0, 3, background=True))
    assert _all(scheduler, _room()) == "1 2 behind"


# Seconds since the one before, seconds that its row runs, and its selection.
arrivals = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 9), st.sampled_from(TASKS)), min_size=1, max_size=60)


def _begun(
    given_arrivals: list[tuple[float, int, Selection | None]], rows: int, rules: Rules
) -> list[tuple[int, float]]:
    """Places of arrival in the order in which they were admitted, and when; rows run for as long as it is said."""
    times = accumulate(gap for gap, _, _ in given_arrivals)
    coming = [(at, *rest) for at, (_, *rest) in zip(times, given_arrivals, strict=True)]
    scheduler, orders, now, running, begun = Scheduler[int](rules), count(), 0.0, [0.0][:0], [(0, 0.0)][:0]
    while coming or len(scheduler):
        while coming and coming[0][0] <= now:
            at, seconds, selection = coming.pop(0)
            scheduler.add(Waiting(int(seconds), selection, at, next(orders)))
        running = [end for end in running if end > now]
        while len(scheduler) and len(running) < rows:
            room = FakeRoom(set(TASKS), idle=not running, free_rows=rows - len(running))
            waiting = scheduler.next(room, now)
            assert waiting is not None
            begun.append((waiting.order, now))
            running.append(now + waiting.job)
        now += 0.5
    return begun


@given(arrivals, st.integers(1, 4))
def test_no_request_is_overtaken_more_often_or_for_longer_than_the_rules_allow(
    given_arrivals: list[tuple[float, int, Selection | None]], rows: int
) -> None:
    begun = _begun(given_arrivals, rows, RULES)
    assert sorted(order for order, _ in begun) == list(range(len(given_arrivals)))
    for place, (order, _) in enumerate(begun):
        overtook = [at for other, at in begun[:place] if other > order]
        assert len(overtook) <= RULES.kin_requests
        assert not overtook or overtook[-1] - overtook[0] < RULES.wait_seconds


@given(st.lists(st.sampled_from(TASKS), min_size=1, max_size=8), st.sets(st.sampled_from(TASKS)))
def test_a_queue_no_longer_than_the_free_rows_is_served_as_without_kinship(
    selections: list[Selection | None], resident: set[Selection | None]
) -> None:
    room = FakeRoom(resident, free_rows=len(selections))
    orders = [
        _all(_queue(A, *selections, rules=replace(RULES, kin_share=kin_share)), room, 1.0) for kin_share in (0, inf)
    ]
    assert orders[0] == orders[1]


def test_a_worker_fills_its_batch_with_kin(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], ask: Callable[..., GenerationRequest]
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"), max_batch=2)
    engine.tokenizer.eos = frozenset()
    halves = [Selection.of([ids] * engine.card.layers) for ids in (range(4), range(4, 8))]
    for half in halves:
        with engine.lease(half):
            pass
    go = threading.Event()
    with EngineWorker(engine, rules=RULES) as worker:
        worker.run(lambda _: go.wait(10))
        streams = [worker.submit(ask((1, 2, 3), halves[number % 2], max_tokens=3 + 2 * number)) for number in range(8)]
        go.set()
        ends = [list(stream)[-1] for stream in streams]
    queued = [end.served.queue_ms for end in ends if isinstance(end, FinishedEvent)]
    assert sorted(range(8), key=queued.__getitem__) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_a_share_is_of_the_experts_that_the_other_has_not_over_what_a_step_takes(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    layers, share = engine.card.layers, engine.admission.share_beside
    less, more = (Selection.of([range(count)] * layers) for count in (4, 6))
    slot = engine.bank.slot_bytes
    step = 4 * layers * slot + engine.plan.dense_bytes + layers * LAYER_BYTES
    assert share(more, less) == 2 * layers * slot / step
    assert share(less, more) == share(more, more) == 0
