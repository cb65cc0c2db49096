"""Equal prompts go through once; afterwards each row is, to the last bit, what it is alone."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from engine import reader as reader_module
from engine.engine import Engine
from engine.generate import Batch
from engine.group import Group
from engine.guard import Guard
from engine.requests import FailedEvent, FinishedEvent, GenerationRequest, TokenEvent
from engine.worker import EngineWorker
from store.errors import Busy, CheckpointError
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]
Ends = dict[int, FinishedEvent]

HALF = Selection.of([[0, 1, 2, 5]] * 3)
PROMPT = tuple(range(7, 30))
ALWAYS = Guard(2.0)  # no level is that high


@pytest.fixture
def engine(checkpoint: Checkpoint, open_engine: Open) -> Engine:
    engine = open_engine(checkpoint("qwen3_moe"), max_batch=4, max_context=64, chunk_tokens=32)
    engine.tokenizer.eos = frozenset()
    return engine


@pytest.fixture
def widths(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and new columns of every pass from now on."""
    return _watch(engine, monkeypatch)


def _watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    real = engine.passes.step

    def step(ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append((ids.shape[0], ids.shape[1]))
        return real(ids, *rest)

    monkeypatch.setattr(engine.passes, "step", step)
    return seen


def _twin(request: GenerationRequest, **sampling: Any) -> GenerationRequest:
    return replace(request, sampling=replace(request.sampling, **sampling), cancelled=Event())


def _family(request: GenerationRequest, rows: int) -> list[GenerationRequest]:
    return [_twin(request, temperature=1.0, seed=seed) for seed in range(rows)]


def _ends(engine: Engine, requests: Sequence[GenerationRequest]) -> Ends:
    return {event.row: event for event in engine.generate(requests) if isinstance(event, FinishedEvent)}


def _same(ours: FinishedEvent, theirs: FinishedEvent) -> None:
    assert (ours.text, ours.reason, ours.completion_tokens) == (theirs.text, theirs.reason, theirs.completion_tokens)
    assert ours.served.coverage == pytest.approx(theirs.served.coverage, abs=1e-5)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_prompt_of_four_rows_goes_through_once_and_each_row_is_what_it_is_alone(
    kind: str, exact: bool, checkpoint: Checkpoint, open_engine: Open, ask: Ask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = open_engine(checkpoint(kind), max_batch=4, max_context=64)
    engine.tokenizer.eos = frozenset()
    half = Selection.of([[0, 1, 2, 5]] * engine.card.layers)
    rows = _family(ask(PROMPT, None if exact else half, max_tokens=6), 4)
    alone = [_ends(engine, [row])[0] for row in rows]
    passes = _watch(engine, monkeypatch)
    for place, end in _ends(engine, rows).items():
        _same(end, alone[place])
    assert passes == [(1, len(PROMPT)), *[(4, 1)] * 5]
    assert len({end.text for end in alone}) > 1


def test_the_first_logits_of_every_row_are_bit_for_bit_those_of_the_row_alone(
    engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.Tensor] = []
    take = Group.take

    def watched(self: Group, logits: torch.Tensor) -> Any:
        taken.append(logits.clone())
        return take(self, logits)

    monkeypatch.setattr(Group, "take", watched)
    prompt = tuple(range(7, 50))  # goes through in chunks
    first, other = ask(prompt, HALF, max_tokens=1), ask(PROMPT, HALF, max_tokens=1)
    for requests in ([first], _family(first, 3), [first, other], [*_family(first, 3), other]):
        _ends(engine, requests)
    alone, three, pair, four = taken
    assert torch.equal(three, alone[[0, 0, 0]])
    assert torch.equal(four, pair[[0, 1, 0, 0]])  # whose own come first


def test_prompts_that_differ_in_their_selection_or_mode_are_not_shared(
    engine: Engine, ask: Ask, widths: list[tuple[int, int]]
) -> None:
    wide = Selection.of([range(6)] * 3)
    requests = [ask(PROMPT, one, max_tokens=4) for one in (HALF, wide, wide, HALF)]
    _ends(engine, [_twin(request) for request in requests])  # each reads its experts, and they stay
    widths.clear()
    ends = _ends(engine, requests)
    assert widths == [(2, 16), (2, 7), *[(4, 1)] * 3]  # chunks of 32 tokens
    for place, end in ends.items():
        _same(end, _ends(engine, [_twin(requests[place])])[0])


@pytest.mark.parametrize("gone", [(0,), (2,), (0, 1, 2), (3,), (0, 3)])
@pytest.mark.parametrize("when", [0, 1])
def test_siblings_cancelled_before_or_in_the_middle_of_the_prompt_take_nobody_along(
    engine: Engine, ask: Ask, gone: tuple[int, ...], when: int
) -> None:
    rows = [*_family(ask(PROMPT, HALF, max_tokens=4), 3), ask(PROMPT[3:], HALF, max_tokens=4)]
    alone = [_ends(engine, [_twin(row)])[0] for row in rows]
    ends: Ends = {}
    with Batch(engine) as batch:
        for number, row in enumerate(rows):
            batch.admit(number, row)
        for boundary in range(12):
            if boundary == when:
                for place in gone:
                    rows[place].cancelled.set()
            ends |= {event.row: event for event in batch.step() if isinstance(event, FinishedEvent)}
        assert not len(batch)
    for place, end in ends.items():
        if place in gone:
            assert (end.reason, end.completion_tokens) == ("cancelled", 0)
            assert 0 <= end.served.coverage <= 1
        else:
            _same(end, alone[place])
    assert len(ends) == 4


def test_more_answers_than_rows_are_all_given(engine: Engine, ask: Ask, widths: list[tuple[int, int]]) -> None:
    rows = _family(ask(PROMPT, HALF, max_tokens=3), 6)
    _ends(engine, [_twin(rows[0])])  # it reads the experts, and they stay
    widths.clear()
    ends = _ends(engine, rows)
    assert widths == [(1, 23), (4, 1), (4, 1), (1, 23), (2, 1), (2, 1)]
    for place, row in enumerate(rows):
        _same(ends[place], _ends(engine, [_twin(row)])[0])


def test_a_sibling_that_is_escalated_leaves_the_others_inside_their_selection(engine: Engine, ask: Ask) -> None:
    inside = ask(PROMPT, HALF, max_tokens=5)
    guarded = replace(_twin(inside), mode="auto", guard=ALWAYS)
    rows = [guarded, inside, replace(guarded, cancelled=Event()), _twin(inside, temperature=1.0, seed=3)]
    ends = _ends(engine, rows)
    for place, row in enumerate(rows):
        _same(ends[place], _ends(engine, [_twin(row)])[0])
    assert [ends[place].served.escalated is not None for place in range(4)] == [True, False, True, False]
    assert ends[0].text == _ends(engine, [ask(PROMPT, max_tokens=5)])[0].text


def test_scores_of_a_shared_prompt_are_each_rows_own(engine: Engine, ask: Ask) -> None:
    wishes = [{"logprobs": 0}, {"logprobs": 3}, {"logprobs": 3}]
    rows = [ask(PROMPT, HALF, max_tokens=0, prompt_logprobs=True, **wish) for wish in wishes]
    ends = _ends(engine, [*rows, ask(PROMPT, HALF, max_tokens=2)])
    assert ends[3].prompt_scores == ()
    for place, row in enumerate(rows):
        assert ends[place].prompt_scores == _ends(engine, [_twin(row)])[0].prompt_scores
        assert [score.token for score in ends[place].prompt_scores] == list(PROMPT)
        assert len(ends[place].prompt_scores[5].top) == wishes[place]["logprobs"]


def test_a_read_that_fails_under_a_shared_prompt_ends_its_rows_in_words_and_leaves_no_lease(
    engine: Engine, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(reader_module.os, "preadv", broken)
    with Batch(engine) as batch:
        for number, row in enumerate(_family(ask(PROMPT, HALF, max_tokens=4), 3)):
            batch.admit(number, row)
        events = [event for _ in range(4) for event in batch.step()]
        assert not len(batch)
    assert sorted(event.row for event in events) == [0, 1, 2]
    assert all(isinstance(event, FailedEvent) and isinstance(event.error, CheckpointError) for event in events)
    assert engine.residency().leased == 0


def test_what_is_submitted_together_begins_together(engine: Engine, ask: Ask, widths: list[tuple[int, int]]) -> None:
    rows = _family(ask(PROMPT, HALF, max_tokens=2), 4)
    with EngineWorker(engine, queue_size=5) as worker:
        for stream in worker.submit_all(rows):
            assert len([event for event in stream if isinstance(event, TokenEvent)]) == 2
    assert widths == [(1, 23), (4, 1)]


def test_of_more_requests_than_the_queue_holds_none_is_queued(engine: Engine, ask: Ask) -> None:
    with EngineWorker(engine, queue_size=3) as worker:
        with pytest.raises(Busy, match="0 requests are waiting already, 4 more would be too many"):
            worker.submit_all(_family(ask(PROMPT, HALF, max_tokens=2), 4))
        assert worker.waiting == 0
