"""Swaps beside rows that run: a disk that holds back, fails or dawdles concerns those alone who wait for it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from slow_disk import Disk

from engine import arrivals as arrivals_module
from engine import reader as reader_module
from engine.engine import Engine
from engine.generate import Batch
from engine.products import Products
from engine.requests import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from engine.worker import EngineWorker, TokenStream
from store.errors import CheckpointError, MoepagerError
from store.records import ExpertKey, Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]

EARLY, LATE = Selection.of([[0, 1, 2, 3]] * 3), Selection.of([[4, 5, 6, 7]] * 3)
BOTH = Selection.of([[2, 3, 4, 5]] * 3)  # shares experts with either
PROMPT = tuple(range(5, 25))


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, checkpoint: Checkpoint, open_engine: Open) -> Engine:
    """Bytes go straight from the file into their slot, or by way of a buffer, where they are cast."""
    engine = open_engine(checkpoint("qwen2_moe", max_shard_size="15KB"), dtype=request.param)
    assert engine.bank.arrivals.direct == (request.param == "float32")
    engine.tokenizer.eos = frozenset()
    return engine


@pytest.fixture
def right(engine: Engine, ask: Ask) -> Callable[[Selection | None], str]:
    """What each selection answers on a good disk, with nothing left in memory but EARLY's experts."""
    texts: dict[Selection | None, str] = {}
    for selection in (LATE, BOTH, None, EARLY):
        engine.evict()
        *_, done = engine.generate([ask(PROMPT, selection, max_tokens=8)])
        assert isinstance(done, FinishedEvent)
        texts[selection] = done.text
    engine.evict()
    with engine.lease(EARLY):
        pass
    return texts.__getitem__


@pytest.fixture
def disk(right: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(reader_module.os, "preadv", disk)
    yield disk
    disk.gate.set()


@pytest.fixture
def worker(engine: Engine, disk: Disk) -> Iterator[EngineWorker]:
    with EngineWorker(engine) as worker:
        yield worker
        disk.gate.set()


def _tokens(stream: TokenStream, count: int) -> None:
    for _ in range(count):
        assert isinstance(next(stream), TokenEvent)


def _done(stream: TokenStream) -> FinishedEvent:
    [*_, done] = stream
    assert isinstance(done, FinishedEvent)
    return done


def _leased(worker: EngineWorker) -> int:
    return worker.run(lambda engine: (engine.bank.residency.check(), engine.residency().leased)[1]).result(20)


def test_rows_that_run_get_their_tokens_while_a_lease_reads(
    worker: EngineWorker, disk: Disk, ask: Ask, right: Callable[[Selection | None], str]
) -> None:
    running = worker.submit(ask(PROMPT, EARLY, max_tokens=400))
    _tokens(running, 2)
    disk.hold()
    swap = worker.submit(ask(PROMPT, LATE, max_tokens=8))
    assert disk.asked.wait(20)
    _tokens(running, 100)  # nothing comes from the disk meanwhile
    same_task = worker.submit(ask(PROMPT, EARLY, max_tokens=8))
    assert _done(same_task).text == right(EARLY)  # and others begin and end
    disk.gate.set()
    done = _done(swap)
    assert (done.text, done.served.experts_paged) == (right(LATE), 12)
    assert 0 < done.served.swap_ms <= done.served.ttft_ms
    running.close()
    assert _leased(worker) == 0


def test_buffers_are_emptied_a_slice_at_a_time_between_the_tokens_of_others(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals_module, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr("engine.plan.BUFFER_BYTES", 1)
    engine = open_engine(checkpoint("qwen2_moe"), dtype="bfloat16")
    engine.tokenizer.eos = frozenset()
    order = []
    with Batch(engine) as batch:
        batch.admit(0, ask(PROMPT, EARLY, max_tokens=40))
        list(batch.step())
        for number, pair in ((1, (4, 5)), (2, (6, 7))):
            batch.admit(number, ask(PROMPT, Selection.of([pair] * 3), max_tokens=4))
        while len(batch):
            order += [event.row for event in batch.step() if isinstance(event, TokenEvent)]
    assert max(order.index(1), order.index(2)) >= 10  # twelve experts, one at each boundary, whoever waits
    assert [order.count(row) for row in range(3)] == [38, 4, 4]


def test_a_receipt_tells_how_long_reads_took(
    engine: Engine, disk: Disk, ask: Ask, right: Callable[[Selection | None], str]
) -> None:
    disk.dawdles = 0.05
    for least, most in ((50, 2000), (0, 5)):  # then they are there
        *_, done = engine.generate([ask(PROMPT, LATE, max_tokens=2)])
        assert isinstance(done, FinishedEvent)
        assert least <= done.served.swap_ms <= most


def test_a_prompt_goes_through_the_first_layer_while_the_others_are_read(
    engine: Engine, ask: Ask, right: Callable[[Selection | None], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives the later layers' experts only once the first layer has computed."""
    computed, many, fetch = threading.Event(), Products.many, reader_module._File.fetch
    spans = [part for expert in range(4, 8) for part in engine.bank.arrivals._experts.span(ExpertKey(0, expert)).parts]

    def compute(*args: Any) -> Any:
        computed.set()
        return many(*args)

    def gated(file: Any, run: Any, staging: Any) -> Any:
        first = any(part.file == run.file and run.start <= part.offset < run.end for part in spans)
        assert first or computed.wait(20), "the first layer waits for the later ones"
        return fetch(file, run, staging)

    monkeypatch.setattr(Products, "many", compute)
    monkeypatch.setattr(reader_module._File, "fetch", gated)
    *_, done = engine.generate([ask(PROMPT, LATE, max_tokens=8)])
    assert isinstance(done, FinishedEvent)
    assert done.text == right(LATE)


def test_a_prompt_that_waits_for_the_disk_gives_way_to_one_that_need_not(
    worker: EngineWorker, disk: Disk, ask: Ask, right: Callable[[Selection | None], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("engine.generate.PATIENT_SECONDS", 0.0)
    disk.hold()
    swap = worker.submit(ask(PROMPT, LATE, max_tokens=8))
    assert disk.asked.wait(20)
    for _ in range(3):
        assert _done(worker.submit(ask(PROMPT, EARLY, max_tokens=8))).text == right(EARLY)
    disk.gate.set()
    assert _done(swap).text == right(LATE)
    assert _leased(worker) == 0


@pytest.mark.parametrize("beside", [True, False])
def test_a_read_that_fails_ends_those_that_wait_for_the_same_and_nobody_else(
    worker: EngineWorker, disk: Disk, ask: Ask, right: Callable[[Selection | None], str], beside: bool
) -> None:
    running = worker.submit(ask(PROMPT, EARLY, max_tokens=400 if beside else 1))
    _tokens(running, 1)
    disk.hold()
    swaps = [worker.submit(ask(PROMPT, LATE, max_tokens=8)) for _ in range(2)]
    assert disk.asked.wait(20)
    other = worker.submit(ask(PROMPT, BOTH, max_tokens=8))
    while worker.waiting:
        time.sleep(0.001)
        if not beside:
            break  # nothing runs: the engine is inside a pass, and admits at the next boundary
    disk.fails = 1
    disk.gate.set()
    for stream in swaps[: 2 if beside else 1]:
        with pytest.raises(CheckpointError, match="Input/output error"):
            list(stream)
    assert _done(other).text == right(BOTH)  # whose experts were in part on their way for the others
    if beside:
        assert worker.running == 1  # it did not have to wait for the others to end
        _tokens(running, 50)
    running.close()
    list(worker.submit(ask(PROMPT, EARLY, max_tokens=1)))
    assert _leased(worker) == 0


@pytest.mark.parametrize("beside", [True, False])
def test_a_client_that_goes_away_while_its_experts_are_read_is_let_go_at_once(
    engine: Engine, worker: EngineWorker, disk: Disk, ask: Ask, right: Callable[[Selection | None], str], beside: bool
) -> None:
    before = engine.residency().experts_paged
    if beside:
        running = worker.submit(ask(PROMPT, EARLY, max_tokens=400))
        _tokens(running, 1)
    disk.hold()
    swap = worker.submit(ask(PROMPT, LATE, max_tokens=8))
    assert disk.asked.wait(20)
    sharing = worker.submit(ask(PROMPT, BOTH, max_tokens=8))
    swap.close()
    done = _done(swap)  # with the disk still held
    assert (done.reason, done.completion_tokens) == ("cancelled", 0)
    if beside:
        running.close()
    disk.gate.set()
    assert _done(sharing).text == right(BOTH)
    assert _leased(worker) == 0
    assert engine.residency().resident == 18  # of what was given up nothing is there,
    assert engine.residency().experts_paged - before == 6  # nor counted


def test_closing_the_worker_while_experts_are_read_finishes_what_was_asked(
    engine: Engine, disk: Disk, ask: Ask, right: Callable[[Selection | None], str]
) -> None:
    worker = EngineWorker(engine)
    disk.hold()
    swap = worker.submit(ask(PROMPT, LATE, max_tokens=8))
    assert disk.asked.wait(20)
    closing = threading.Thread(target=worker.close)
    closing.start()
    disk.gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert _done(swap).text == right(LATE)


def test_an_engine_that_is_closed_in_mid_swap_leaves_no_lease_and_no_thread(
    checkpoint: Checkpoint, ask: Ask, monkeypatch: pytest.MonkeyPatch, open_engine: Open
) -> None:
    engine, disk = open_engine(checkpoint("qwen2_moe")), Disk()
    engine.tokenizer.eos = frozenset()
    with engine.lease(EARLY):
        pass
    monkeypatch.setattr(reader_module.os, "preadv", disk)
    with Batch(engine) as batch:
        batch.admit(0, ask(PROMPT, EARLY, max_tokens=40))
        list(batch.step())
        disk.hold()
        batch.admit(1, ask(PROMPT, LATE, max_tokens=4))
        list(batch.step())
        assert engine.residency().leased == 24
    assert engine.residency().leased == 0
    engine.bank.residency.check()
    disk.gate.set()
    engine.close()
    assert not any(thread.is_alive() for thread in engine._reader._threads)


def _drive(
    engine: Engine, disk: Disk, rng: random.Random, waiting: list[tuple[int, int, GenerationRequest]]
) -> dict[int, Any]:
    """Each (number, boundary, request) arrives then or as soon as it fits; how each of them ended."""
    ended: dict[int, Any] = {}
    boundary = 0
    with Batch(engine, lambda batch: rng.random() < 0.2) as batch:
        while waiting or len(batch):
            for one in [one for one in waiting if one[1] <= boundary and batch.fits(one[2].selection)]:
                if batch.fits(one[2].selection):
                    waiting.remove(one)
                    try:
                        batch.admit(one[0], one[2])
                    except MoepagerError as error:  # a read that it shares with another has failed already
                        ended[one[0]] = FailedEvent(one[0], error)
                        continue
                    if rng.random() < 0.15:
                        one[2].cancelled.set()
            disk.fails = 1 if rng.random() < 0.1 else disk.fails
            if rng.random() < 0.2:
                engine.evict()
            ended |= {e.row: e for e in batch.step() if isinstance(e, FinishedEvent | FailedEvent)}
            boundary += 1
    return ended


@pytest.mark.parametrize("seed", range(4))
def test_on_a_disk_that_dawdles_and_fails_whoever_is_answered_is_answered_right(
    seed: int, engine: Engine, disk: Disk, ask: Ask, right: Callable[[Selection | None], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Random arrivals over selections that share experts; some are cancelled, some reads fail."""
    rng = random.Random(seed)
    monkeypatch.setattr("engine.generate.PATIENT_SECONDS", 0.0)
    monkeypatch.setattr("engine.arrivals.GLANCE_SECONDS", 0.0005)
    monkeypatch.setattr("engine.pause.HELD_UP_SECONDS", 0.0005)
    disk.dawdles = 0.001
    waiting = [
        (number, rng.randrange(40), ask(PROMPT, rng.choice([EARLY, LATE, BOTH, None]), max_tokens=8))
        for number in range(24)
    ]
    asked = {number: request.selection for number, _, request in waiting}
    ended = _drive(engine, disk, rng, waiting)
    assert len(ended) == 24
    answered = [event for event in ended.values() if isinstance(event, FinishedEvent) and event.reason == "length"]
    assert answered
    for event in answered:
        assert event.text == right(asked[event.row])
    for event in ended.values():
        assert isinstance(event, FinishedEvent) or "Input/output error" in str(event.error)
    assert engine.residency().leased == 0
    assert not engine.bank.residency.unfilled
    engine.bank.residency.check()


def test_a_disk_that_stalls_costs_the_rows_that_run_nothing(
    engine: Engine, worker: EngineWorker, disk: Disk, ask: Ask, monkeypatch: pytest.MonkeyPatch,
    right: Callable[[Selection | None], str],
) -> None:  # fmt: skip
    monkeypatch.setattr(engine._reader, "_patience", 0.2)
    running = worker.submit(ask(PROMPT, EARLY, max_tokens=400))
    _tokens(running, 2)
    disk.hold()
    stalled = [worker.submit(ask(PROMPT, LATE, max_tokens=8)) for _ in range(2)]
    for stream in stalled:
        with pytest.raises(CheckpointError, match="The disk stalls"):
            list(stream)
    _tokens(running, 20)
    running.close()
    disk.gate.set()
    assert _done(worker.submit(ask(PROMPT, LATE, max_tokens=8))).text == right(LATE)
    assert _leased(worker) == 0


def test_cold_requests_do_not_take_every_row_from_those_that_need_no_disk(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, disk = open_engine(checkpoint("qwen2_moe"), max_batch=4), Disk()
    engine.tokenizer.eos = frozenset()
    *_, right = engine.generate([ask(PROMPT, EARLY, max_tokens=4)])
    assert isinstance(right, FinishedEvent)
    monkeypatch.setattr(reader_module.os, "preadv", disk)
    with EngineWorker(engine) as worker:
        running = worker.submit(ask(PROMPT, EARLY, max_tokens=450))
        _tokens(running, 2)
        disk.hold()
        cold = [worker.submit(ask(PROMPT, selection, max_tokens=4)) for selection in (LATE, LATE, LATE, BOTH, BOTH)]
        assert disk.asked.wait(20)
        for _ in range(3):
            assert _done(worker.submit(ask(PROMPT, EARLY, max_tokens=4))).text == right.text
        running.close()
        disk.gate.set()
        assert [_done(stream).completion_tokens for stream in cold] == [4] * 5


def test_a_client_that_goes_away_while_its_prompt_goes_through_is_let_go(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"), chunk_tokens=8)
    engine.tokenizer.eos = frozenset()
    leaving, staying = ask(PROMPT, EARLY, max_tokens=4), ask(PROMPT, LATE, max_tokens=4)
    *_, alone = engine.generate([staying])
    assert isinstance(alone, FinishedEvent)
    with Batch(engine) as batch:
        batch.admit(0, leaving)
        batch.admit(1, staying)
        assert not list(batch.step())  # the first of several chunks of both
        leaving.cancelled.set()
        events = [event for _ in range(12) for event in batch.step()]
    ended = {event.row: event for event in events if isinstance(event, FinishedEvent)}
    assert (ended[0].reason, ended[0].completion_tokens) == ("cancelled", 0)
    assert ended[1].text == alone.text


def test_a_client_in_mode_exact_that_goes_away_while_its_pass_waits_for_the_disk_leaves_nothing_pinned(
    worker: EngineWorker, disk: Disk, ask: Ask, right: Callable[[Selection | None], str]
) -> None:
    disk.hold()
    exact = worker.submit(ask(PROMPT, max_tokens=8))
    assert disk.asked.wait(20)
    exact.close()
    disk.gate.set()
    done = _done(exact)
    assert done.reason == "cancelled"
    assert done.completion_tokens <= 2  # of the boundary that was under way: its prompt's, and one more
    assert _leased(worker) == 0
    assert _done(worker.submit(ask(PROMPT, max_tokens=8))).text == right(None)


def test_more_tasks_at_once_than_fit_are_all_answered_one_after_the_other(
    checkpoint: Checkpoint, open_engine: Open, ask: Ask, right: Callable[[Selection | None], str]
) -> None:
    folder = checkpoint("qwen2_moe", max_shard_size="15KB")
    roomy = open_engine(folder, chunk_tokens=64)
    tight = open_engine(folder, chunk_tokens=64, memory=roomy.plan.fixed_bytes + 14 * roomy.plan.slot_bytes)
    tight.tokenizer.eos = frozenset()
    assert tight.plan.slots < 24  # of three selections of twelve, one at a time fits
    wanted = [EARLY, LATE, BOTH, None, LATE, EARLY, None, BOTH]
    with EngineWorker(tight) as worker:
        streams = [worker.submit(ask(PROMPT, selection, max_tokens=8)) for selection in wanted]
        for selection, stream in zip(wanted, streams, strict=True):
            assert _done(stream).text == right(selection)
        assert _leased(worker) == 0
