"""The worker: streams from threads and asyncio, batches, a full queue, cancelling, errors, shutting down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, TokenEvent
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


def test_waiting_requests_that_fit_together_run_as_one_batch(
    engine: Engine, worker: EngineWorker, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = engine.generate
    monkeypatch.setattr(engine, "generate", lambda requests: (sizes.append(len(requests)), real(requests))[1])
    go = _hold(worker)
    streams = [worker.submit(ask((n + 1,) * (n + 1), HALF if n % 2 else None, max_tokens=4)) for n in range(6)]
    assert worker.waiting == 6
    go.set()
    for stream in streams:
        assert len(list(stream)) == 5
    assert sizes == [6]


def test_requests_whose_context_does_not_fit_together_wait_for_the_next_batch(worker: EngineWorker, ask: Ask) -> None:
    go = _hold(worker)
    wide = worker.submit(ask((1,) * 400, max_tokens=3))
    long = worker.submit(ask((1,), max_tokens=200))
    small = worker.submit(ask((2,), max_tokens=3))
    go.set()
    assert [len(list(stream)) for stream in (wide, small, long)] == [4, 4, 201]


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
    monkeypatch.setattr(engine._reader, "read", fail)
    streams = [worker.submit(ask((1,), HALF, max_tokens=2)) for _ in range(3)]
    go.set()
    for stream in streams:
        with pytest.raises(CheckpointError, match="the disk is gone"):
            list(stream)
        assert list(stream) == []
    monkeypatch.undo()
    assert len(list(worker.submit(ask((1,), HALF, max_tokens=2)))) == 3


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
