"""Exact rows beside others: their misses hold nobody up for long, and what they wait for ends, fails or is given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slow_disk import Disk
from waiting import wait_for

from engine import reader as reader_module
from engine.engine import Engine
from engine.generate import Batch
from engine.requests import Event, FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from engine.worker import EngineWorker, TokenStream
from store.errors import DiskError
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]

EARLY = Selection.of([[0, 1, 2, 3]] * 3)
PROMPT, LONG = tuple(range(5, 25)), tuple(range(5, 85))
MASKED, EXACT = 0, 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(reader_module.os, "preadv", disk)
    monkeypatch.setattr("engine.pause.HELD_UP_SECONDS", 0.001)
    yield disk
    disk.gate.set()


@pytest.fixture(params=["qwen2_moe", "qwen3_next"])
def folder(request: pytest.FixtureRequest, checkpoint: Checkpoint) -> Path:
    """Of a model that caches keys and values, or running states, too."""
    return checkpoint(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, folder: Path, open_engine: Open) -> Engine:
    """Bytes go straight from the file into their slot, or by way of a buffer, where they are cast."""
    engine = open_engine(folder, dtype=request.param)
    engine.tokenizer.eos = frozenset()
    return engine


@pytest.fixture
def tight(folder: Path, open_engine: Open) -> Engine:
    """A lease of EARLY leaves two slots, which is what one token of one layer needs."""
    plan = open_engine(folder, chunk_tokens=16).plan
    engine = open_engine(folder, chunk_tokens=16, memory=plan.fixed_bytes + 14 * plan.slot_bytes)
    engine.tokenizer.eos = frozenset()
    return engine


def _alone(engine: Engine, request: GenerationRequest) -> FinishedEvent:
    *_, done = engine.generate([request])
    assert isinstance(done, FinishedEvent)
    return done


def _step(batch: Batch, until: Callable[[list[Event | FailedEvent]], bool]) -> list[Event | FailedEvent]:
    events: list[Event | FailedEvent] = []

    def done() -> bool:
        events.extend(batch.step())
        return until(events)

    wait_for(done, 60)
    return events


def _has(row: int, count: int) -> Callable[[list[Event | FailedEvent]], bool]:
    """Whether the row got so many tokens."""
    return lambda events: sum(isinstance(event, TokenEvent) and event.row == row for event in events) >= count


def _ended(batch: Batch) -> dict[int, FinishedEvent | FailedEvent]:
    events = _step(batch, lambda _: not len(batch))
    return {event.row: event for event in events if isinstance(event, FinishedEvent | FailedEvent)}


def _assert_equal(done: FinishedEvent | FailedEvent, alone: FinishedEvent) -> None:
    assert isinstance(done, FinishedEvent)
    assert (done.text, done.completion_tokens) == (alone.text, alone.completion_tokens)
    assert [score.logprob for score in done.scores] == pytest.approx(
        [score.logprob for score in alone.scores], abs=1e-4
    )


def _both_run(batch: Batch, *requests: GenerationRequest) -> None:
    """Both have tokens, and then the exact one's experts are gone from memory."""
    for number, request in enumerate(requests):
        batch.admit(number, request)
    _step(batch, lambda events: _has(MASKED, 2)(events) and _has(EXACT, 2)(events))


@pytest.mark.parametrize("max_context", [512, 48])
def test_a_masked_row_gets_tokens_while_an_exact_one_beside_it_waits_whose_answer_is_the_same_afterwards(
    folder: Path, open_engine: Open, disk: Disk, ask: Ask, max_context: int
) -> None:
    """In the smaller context the masked row's tokens reach the end of the cache while the other stands still."""
    engine = open_engine(folder, max_context=max_context)
    engine.tokenizer.eos = frozenset()
    masked = ask(PROMPT[:6], EARLY, max_tokens=42, logprobs=0)
    exact = ask(PROMPT, max_tokens=12, logprobs=0)
    alone = [_alone(engine, masked), _alone(engine, exact)]
    with Batch(engine) as batch:
        _both_run(batch, masked, exact)
        engine.evict()
        disk.hold()
        waited = _step(batch, _has(MASKED, 30))
        assert disk.asked.is_set()
        assert not _has(EXACT, 2)(waited)  # one at most, if that needed nothing from the disk
        disk.gate.set()
        ended = _ended(batch)
    for row in (MASKED, EXACT):
        _assert_equal(ended[row], alone[row])
    assert engine.residency().leased == 0


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_rows_that_run_and_prompts_that_need_no_disk_go_on_while_an_exact_prompt_waits(
    folder: Path, open_engine: Open, disk: Disk, ask: Ask, prompt: tuple[int, ...]
) -> None:
    engine = open_engine(folder, chunk_tokens=16)
    engine.tokenizer.eos = frozenset()
    exact, short = ask(prompt, max_tokens=6, logprobs=0), ask(PROMPT, EARLY, max_tokens=4)
    alone, briefly = _alone(engine, exact), _alone(engine, short)
    engine.evict()
    with Batch(engine) as batch:
        batch.admit(MASKED, ask(PROMPT, EARLY, max_tokens=200))
        _step(batch, _has(MASKED, 2))
        disk.hold()
        batch.admit(EXACT, exact)
        _step(batch, _has(MASKED, 20))
        assert disk.asked.is_set()
        batch.admit(2, short)
        events = _step(batch, _has(2, 4))
        [done] = [event for event in events if isinstance(event, FinishedEvent)]
        assert (done.row, done.text) == (2, briefly.text)
        disk.gate.set()
        _assert_equal(_ended(batch)[EXACT], alone)


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_on_a_slow_disk_with_few_slots_an_exact_row_that_is_broken_off_again_and_again_gets_through(
    tight: Engine, disk: Disk, ask: Ask, prompt: tuple[int, ...]
) -> None:
    exact, masked = ask(prompt, max_tokens=2, logprobs=0), ask(PROMPT, EARLY, max_tokens=300)
    alone = _alone(tight, exact)
    with Batch(tight) as batch:
        batch.admit(MASKED, masked)
        _step(batch, _has(MASKED, 1))
        disk.dawdles = 0.03
        batch.admit(EXACT, exact)
        events = _step(batch, lambda events: any(isinstance(event, FinishedEvent) for event in events))
        [done] = [event for event in events if isinstance(event, FinishedEvent)]
        assert done.row == EXACT
        _assert_equal(done, alone)
        assert _has(MASKED, 10)(events)  # it alone decodes twice
        assert done.served.experts_paged >= 20


@pytest.mark.parametrize("runs", [True, False])
def test_where_the_disk_stalls_the_exact_request_alone_ends_with_an_error(
    engine: Engine, disk: Disk, ask: Ask, monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    monkeypatch.setattr(engine._reader, "_patience", 0.3)
    masked, exact = ask(PROMPT, EARLY, max_tokens=400), ask(PROMPT, max_tokens=30)
    with Batch(engine) as batch:
        batch.admit(MASKED, masked)
        _step(batch, _has(MASKED, 2))
        if runs:
            batch.admit(EXACT, exact)
            _step(batch, _has(EXACT, 2))
        engine.evict()
        disk.hold()
        if not runs:
            batch.admit(EXACT, exact)
        events = _step(batch, lambda events: any(isinstance(event, FailedEvent) for event in events))
        assert _has(MASKED, 2)(events)
        [failed] = [event for event in events if isinstance(event, FailedEvent)]
        assert failed.row == EXACT
        assert isinstance(failed.error, DiskError)
        assert "The disk stalls" in str(failed.error)
        assert engine.residency().leased == 12
        _step(batch, _has(MASKED, 5))
        masked.cancelled.set()
        _ended(batch)
    engine.bank.residency.check()


def _done(stream: TokenStream) -> FinishedEvent:
    [*_, done] = stream
    assert isinstance(done, FinishedEvent)
    return done


@pytest.mark.parametrize("runs", [True, False])
@pytest.mark.parametrize("beside", [True, False])
def test_an_exact_client_that_goes_away_while_it_waits_is_let_go_at_once(
    tight: Engine, disk: Disk, ask: Ask, beside: bool, runs: bool
) -> None:
    right = _alone(tight, ask(PROMPT, max_tokens=8)).text
    tight.evict()
    with EngineWorker(tight) as worker:
        if beside:
            running = worker.submit(ask(PROMPT, EARLY, max_tokens=490))
            next(running)
        if not runs:
            disk.hold()
        exact = worker.submit(ask(PROMPT, max_tokens=400))
        if runs:
            next(exact)
            disk.hold()  # some token soon needs an expert for which there was no slot
        assert disk.asked.wait(20)
        began = time.monotonic()
        exact.close()
        assert _done(exact).reason == "cancelled"
        assert time.monotonic() - began < 10  # with the disk still held, which lets a read go after 20
        if beside:
            running.close()
            list(running)
        assert worker.run(lambda engine: engine.residency().leased).result(20) == 0
        disk.gate.set()
        assert _done(worker.submit(ask(PROMPT, max_tokens=8))).text == right


def test_what_exact_rows_wait_for_stays_pinned_and_is_let_go_when_the_batch_ends(
    engine: Engine, disk: Disk, ask: Ask
) -> None:
    with Batch(engine) as batch:
        batch.admit(MASKED, ask(PROMPT, EARLY, max_tokens=400))
        _step(batch, _has(MASKED, 2))
        disk.hold()
        batch.admit(EXACT, ask(PROMPT, max_tokens=4))
        _step(batch, _has(MASKED, 5))
        assert engine.residency().leased > 12
    assert engine.residency().leased == 0
    disk.gate.set()
