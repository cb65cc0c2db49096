"""The worker: streams from threads and asyncio, joining, a full queue, cancelling, errors, shutting down."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import stream as streams_module
from engine.engine import Engine
from engine.generate import JOIN_TOKENS
from engine.requests import FinishedEvent, GenerationRequest, TokenEvent
from engine.scheduler import Rules
from engine.worker import EngineWorker, TokenStream
from store.errors import Busy, CheckpointError, InvalidInput
from store.records import Selection

Ask = Callable[..., GenerationRequest]
HALF = Selection.of([range(4)] * 3)


@pytest.fixture
def engine(checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]) -> Engine:
    engine = open_engine(checkpoint("qwen2_moe"))
    engine.tokenizer.eos = frozenset()
    return engine


@pytest.fixture
def worker(engine: Engine) -> Iterator[EngineWorker]:
    with EngineWorker(engine, queue_size=8) as worker:
        yield worker


def _hold(worker: EngineWorker) -> threading.Event:
    """Keep the device busy until the event is set, so that requests gather in the queue."""
    go, begun = threading.Event(), threading.Event()
    worker.run(lambda _: (begun.set(), go.wait(10)))
    assert begun.wait(10)
    return go


def test_a_stream_gives_tokens_and_then_the_receipt(worker: EngineWorker, ask: Ask) -> None:
    events = list(worker.submit(ask((1, 2, 3), HALF, max_tokens=5)))
    assert [type(event) for event in events] == [TokenEvent] * 5 + [FinishedEvent]
    assert {event.row for event in events} == {0}


def test_asyncio_reads_the_same_stream(worker: EngineWorker, ask: Ask) -> None:
    wanted = [event.token for event in worker.submit(ask((1, 2, 3), max_tokens=6)) if isinstance(event, TokenEvent)]

    async def read() -> list[list[int]]:
        streams = [worker.submit(ask((1, 2, 3), max_tokens=6)) for _ in range(4)]

        async def one(stream: TokenStream) -> list[int]:
            async with stream:
                return [event.token async for event in stream if isinstance(event, TokenEvent)]

        return list(await asyncio.gather(*map(one, streams)))

    assert asyncio.run(read()) == [wanted] * 4


def test_who_waits_for_the_end_alone_gets_it_and_no_token_wakes_them(
    worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, wanted = worker.submit(ask((1, 2, 3), max_tokens=6))
    assert isinstance(wanted, FinishedEvent)
    woken = 0
    wake = streams_module._set

    def counted(*to: Any) -> None:
        nonlocal woken
        woken += 1
        wake(*to)

    monkeypatch.setattr(streams_module, "_set", counted)

    async def read(held: threading.Event) -> FinishedEvent:
        end = asyncio.ensure_future(worker.submit(ask((1, 2, 3), max_tokens=6)).last())
        await asyncio.sleep(0.01)  # it waits before the first token comes
        held.set()
        return await end

    last = asyncio.run(read(_hold(worker)))
    assert (last.text, last.completion_tokens, woken) == (wanted.text, 6, 1)


def test_a_plain_thread_may_wait_for_the_end_alone_too(worker: EngineWorker, ask: Ask) -> None:
    *_, wanted = worker.submit(ask((1, 2, 3), max_tokens=6))
    assert isinstance(wanted, FinishedEvent)
    held = _hold(worker)
    stream = worker.submit(ask((1, 2, 3), max_tokens=6))
    waiting = threading.Thread(target=lambda: ends.append(stream.end()))
    ends: list[FinishedEvent] = []
    waiting.start()
    held.set()
    waiting.join(10)
    assert [(end.text, end.completion_tokens) for end in ends] == [(wanted.text, 6)]
    assert not stream._items


def test_who_waits_for_the_end_hears_of_an_error(
    worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(engine.passes, "step", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        asyncio.run(worker.submit(ask((1, 2, 3), max_tokens=6)).last())
    with pytest.raises(CheckpointError, match="the disk is gone"):
        worker.submit(ask((1, 2, 3), max_tokens=6)).end()


def _record_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and new columns of every pass from now on."""
    steps: list[tuple[int, int]] = []
    real = engine.passes.step

    def step(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        steps.append((ids.shape[0], ids.shape[1]))
        return real(ids, *rest)

    monkeypatch.setattr(engine.passes, "step", step)
    return steps


def test_waiting_requests_run_as_one_batch(
    engine: Engine, worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _record_steps(engine, monkeypatch)
    go = _hold(worker)
    streams = [worker.submit(ask((n + 1,) * (n + 1), HALF, max_tokens=4)) for n in range(6)]
    assert worker.waiting == 6
    go.set()
    for stream in streams:
        assert len(list(stream)) == 5
    assert steps == [(6, 6), (6, 1), (6, 1), (6, 1)]


def test_a_request_joins_what_runs_and_leaves_before_it_ends(worker: EngineWorker, ask: Ask) -> None:
    long = worker.submit(ask((1, 2), HALF, max_tokens=450))
    next(long)
    assert len(list(worker.submit(ask((1,) * 300, max_tokens=3)))) == 4
    assert worker.running == 1
    assert len(list(long)) == 450


def test_a_long_prompt_lets_the_others_go_on(
    engine: Engine, worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = worker.submit(ask((1, 2), HALF, max_tokens=300))
    next(running)
    steps = _record_steps(engine, monkeypatch)
    assert len(list(worker.submit(ask((1,) * 400, HALF, max_tokens=2)))) == 3
    chunks = [place for place, (_, columns) in enumerate(steps) if columns > 1]
    assert sum(steps[place][1] for place in chunks) == 400
    assert max(columns for _, columns in steps) == JOIN_TOKENS
    assert all(steps[place + 1] == (1, 1) for place in chunks[:-1])  # a token between two chunks
    running.close()


def test_requests_as_wide_as_the_context_run_together(worker: EngineWorker, ask: Ask) -> None:
    go = _hold(worker)
    wide = worker.submit(ask((1,) * 500, max_tokens=3))
    long = worker.submit(ask((1,), max_tokens=500))
    small = worker.submit(ask((2,), max_tokens=3))
    go.set()
    assert [len(list(stream)) for stream in (wide, small, long)] == [4, 4, 501]


def test_a_request_cancelled_in_the_queue_is_answered_and_costs_nothing(
    engine: Engine, worker: EngineWorker, ask: Ask
) -> None:
    go = _hold(worker)
    streams = [worker.submit(ask((1,), Selection.of([[n, n + 1]] * 3), max_tokens=2)) for n in range(4, 7)]
    others = [worker.submit(ask((1,), HALF, max_tokens=2)) for _ in range(5)]
    for stream in streams:
        stream.close()
    late = [worker.submit(ask((1,), HALF, max_tokens=2)) for _ in range(3)]  # the queue of 8 was full
    for stream in streams:
        [done] = stream  # while the device is busy
        assert isinstance(done, FinishedEvent)
        assert (done.reason, done.completion_tokens, done.served.experts) == ("cancelled", 0, 6)
    go.set()
    assert all(len(list(stream)) == 3 for stream in (*others, *late))
    assert engine.residency().experts_paged == len(HALF)


def test_queue_time_and_time_to_first_token_count_from_submit(worker: EngineWorker, ask: Ask) -> None:
    go = _hold(worker)
    stream = worker.submit(ask((1,), HALF, max_tokens=2))
    time.sleep(0.05)
    go.set()
    [*_, done] = stream
    assert isinstance(done, FinishedEvent)
    assert 50 <= done.served.queue_ms < done.served.ttft_ms


def test_background_requests_wait_until_their_experts_are_there_and_cause_no_swap(
    engine: Engine, worker: EngineWorker, ask: Ask
) -> None:
    other = Selection.of([range(4, 8)] * 3)
    running = worker.submit(ask((1,), HALF, max_tokens=400))
    next(running)
    swap = worker.submit(replace(ask((1,), other, max_tokens=2), priority="background"))
    there = worker.submit(replace(ask((1,), HALF, max_tokens=2), priority="background"))
    assert len(list(there)) == 3
    assert engine.residency().experts_paged == len(HALF)
    running.close()
    list(running)
    assert worker.run(lambda engine: engine.residency().experts_paged).result(10) == len(HALF)  # nothing runs, no swap
    [*_, first] = worker.submit(ask((1,), other, max_tokens=2))  # somebody in front has them read
    [*_, second] = swap
    assert isinstance(first, FinishedEvent)
    assert isinstance(second, FinishedEvent)
    assert (first.served.experts_paged, second.served.experts_paged) == (len(other), 0)


@pytest.mark.parametrize("closes", [True, False])
def test_background_requests_whose_experts_do_not_come_are_refused(engine: Engine, ask: Ask, closes: bool) -> None:
    """When their time is over, or when the worker is closed, which waits for nothing that can't happen."""
    with EngineWorker(engine, rules=Rules(background_seconds=60 if closes else 0.1)) as worker:
        stream = worker.submit(replace(ask((1,), HALF, max_tokens=2), priority="background"))
        if not closes:
            with pytest.raises(Busy, match=r"cause no swap.*for 0\.1"):
                list(stream)
    if closes:
        with pytest.raises(Busy, match="cause no swap"):
            list(stream)
    assert (worker.waiting, engine.residency().resident) == (0, 0)


def test_a_background_request_that_is_cancelled_while_nothing_happens_ends(worker: EngineWorker, ask: Ask) -> None:
    stream = worker.submit(replace(ask((1,), HALF, max_tokens=2), priority="background"))
    stream.close()
    [done] = stream
    assert isinstance(done, FinishedEvent)
    assert done.reason == "cancelled"


def test_a_full_queue_is_busy_and_loses_nothing(worker: EngineWorker, ask: Ask) -> None:
    go = _hold(worker)
    streams = [worker.submit(ask((1,), max_tokens=2)) for _ in range(8)]
    with pytest.raises(Busy, match="8 requests are waiting"):
        worker.submit(ask((1,), max_tokens=2))
    go.set()
    assert all(len(list(stream)) == 3 for stream in streams)


def test_closing_a_stream_cancels_the_request_and_frees_its_lease(
    engine: Engine, worker: EngineWorker, ask: Ask
) -> None:
    with worker.submit(ask((1, 2), HALF, max_tokens=400)) as stream:
        next(stream)
    [*_, done] = stream
    assert isinstance(done, FinishedEvent)
    assert done.reason == "cancelled"
    assert done.completion_tokens < 400
    assert worker.run(lambda engine: engine.residency().leased).result(10) == 0


def test_a_request_that_can_never_be_served_is_refused_at_once(worker: EngineWorker, ask: Ask) -> None:
    with pytest.raises(InvalidInput, match="prompt is empty"):
        worker.submit(ask(()))
    assert worker.waiting == 0


def test_an_error_reaches_every_reader_of_the_batch_and_the_worker_lives_on(
    engine: Engine, worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is gone")

    go = _hold(worker)
    for name in ("read", "start"):
        monkeypatch.setattr(engine._reader, name, fail, raising=False)
    streams = [worker.submit(ask((1,), HALF, max_tokens=2)) for _ in range(3)]
    go.set()
    for stream in streams:
        with pytest.raises(CheckpointError, match="the disk is gone"):
            list(stream)
        assert list(stream) == []
    monkeypatch.undo()
    assert len(list(worker.submit(ask((1,), HALF, max_tokens=2)))) == 3


def test_a_request_whose_admission_breaks_is_told_and_the_worker_lives_on(
    worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr("engine.row.Sampler", broken)
    stream = worker.submit(ask((1,), HALF, max_tokens=2))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        list(stream)
    monkeypatch.undo()
    assert len(list(worker.submit(ask((1,), HALF, max_tokens=2)))) == 3


def test_experts_that_cannot_be_read_fail_their_own_request_alone(
    engine: Engine, worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CheckpointError("the disk is gone")

    running = worker.submit(ask((1,), HALF, max_tokens=300))
    next(running)
    for name in ("read", "start"):
        monkeypatch.setattr(engine._reader, name, fail, raising=False)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        list(worker.submit(ask((1,), Selection.of([range(4, 8)] * 3), max_tokens=2)))
    with pytest.raises(CheckpointError, match="the disk is gone"):
        list(worker.submit(ask((1, 2, 3), max_tokens=300)))
    assert len(list(running)) == 300


def test_calls_run_on_the_engines_thread_and_bring_back_errors(worker: EngineWorker) -> None:
    assert worker.run(lambda _: threading.current_thread().name).result(10) == "moepager-engine"
    with pytest.raises(ZeroDivisionError):
        worker.run(lambda _: 1 / 0).result(10)


def test_closing_finishes_what_is_queued_and_takes_no_more(engine: Engine, ask: Ask) -> None:
    worker = EngineWorker(engine)
    streams = [worker.submit(ask((1,), max_tokens=30)) for _ in range(3)]
    worker.close()
    assert all(len(list(stream)) == 31 for stream in streams)
    with pytest.raises(Busy, match="shutting down"):
        worker.submit(ask((1,)))


def test_a_reader_whose_loop_has_gone_does_no_harm(worker: EngineWorker, ask: Ask) -> None:
    async def abandon() -> TokenStream:
        stream = worker.submit(ask((1, 2), max_tokens=300))
        await anext(stream)
        reader = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reader.cancel()
        return stream

    stream = asyncio.run(abandon())
    stream.close()
    assert len(list(worker.submit(ask((1,), max_tokens=2)))) == 3


def test_what_a_swap_will_cost_is_said_when_it_is_submitted_and_in_the_receipt(
    engine: Engine, worker: EngineWorker, ask: Ask
) -> None:
    wider = Selection.of([range(6)] * 3)
    for selection, missing in ((HALF, 12), (HALF, 0), (wider, 6)):
        stream = worker.submit(ask((1, 2, 3), selection, max_tokens=2))
        assert stream.predicted is not None
        assert stream.predicted.bytes == missing * engine.card.expert_bytes
        assert (stream.predicted.seconds > 0) == (missing > 0)
        [*_, done] = stream
        assert isinstance(done, FinishedEvent)
        assert done.served.predicted == stream.predicted
        assert done.served.bytes_paged == stream.predicted.bytes
    assert worker.submit(ask((1, 2, 3), max_tokens=2)).predicted is None  # which of the others, its routing will tell
