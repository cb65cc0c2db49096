"""Mode auto: what the guard meters, how its bound is drawn, and that what it escalates is finished exactly."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.generate import Batch
from engine.guard import NEWEST, WATCH, Guard, draw_guard, items_needed
from engine.plan import plan_memory
from engine.requests import Event, FailedEvent, FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.routing import Routing
from store.errors import InvalidInput, OffTask
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]

PROMPT = tuple(range(40, 61))
ALWAYS = Guard(2.0)  # no level is that high


@pytest.fixture
def engine(checkpoint: Checkpoint, open_engine: Open) -> Engine:
    made = open_engine(checkpoint("qwen2_moe"), chunk_tokens=8)
    made.tokenizer.eos = frozenset()
    return made


def _half(engine: Engine, start: int = 0) -> Selection:
    return Selection.of([range(start, engine.card.experts, 2)] * engine.card.layers)


def _auto(selection: Selection, guard: Guard, tokens: int = 12, **fields: Any) -> GenerationRequest:
    return GenerationRequest(
        fields.pop("prompt", PROMPT), selection, "auto", Sampling(max_tokens=tokens), guard=guard, **fields
    )


def _exact(prompt: Sequence[int], tokens: int) -> GenerationRequest:
    return GenerationRequest(tuple(prompt), None, "exact", Sampling(max_tokens=tokens))


def _run(engine: Engine, *requests: GenerationRequest) -> tuple[list[list[TokenEvent]], list[FinishedEvent]]:
    events: list[Event] = list(engine.generate(requests))
    tokens = [[e for e in events if isinstance(e, TokenEvent) and e.row == row] for row in range(len(requests))]
    ends = {e.row: e for e in events if isinstance(e, FinishedEvent)}
    return tokens, [ends[row] for row in range(len(requests))]


def _ids(tokens: Sequence[TokenEvent]) -> list[int]:
    return [event.token for event in tokens]


class _Coverage:
    """The slow truth: softmax, top-k and the weights inside, from the unrestricted router's logits."""

    def __init__(self, selection: Selection, top_k: int) -> None:
        self.shares: list[torch.Tensor] = []
        self._selection, self._top_k = selection, top_k

    def routed(self, layer: int, x: Any, logits: Any, weights: Any, index: Any, valid: Any) -> None:
        best = logits.double().softmax(-1).topk(self._top_k)
        inside = torch.isin(best.indices, torch.tensor(self._selection.experts[layer]))
        self.shares.append((best.values * inside).sum(-1) / best.values.sum(-1))

    def residual(self, layer: int, h: Any) -> None: ...
    def experts(self, layer: int, experts: Any, tokens: Any, weights: Any, outputs: Any) -> None: ...
    def combined(self, layer: int, y: Any) -> None: ...


def _levels(engine: Engine, selection: Selection, tokens: Sequence[int]) -> list[float]:
    seen = _Coverage(selection, engine.card.top_k)
    singly = torch.tensor([tokens])
    with_room = range(0, len(tokens), engine.plan.chunk_tokens)
    assert len(with_room) == 1, "the reference goes through in one pass"
    engine.forward(singly, torch.ones_like(singly), [selection], seen)
    levels, level = [], None
    for covered in torch.stack(seen.shares).mean(0).tolist():
        level = covered if level is None else (1 - NEWEST) * level + NEWEST * covered
        levels.append(level)
    return levels


def test_the_level_is_a_mean_of_coverage_that_forgets_in_any_batch_and_chunking(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint("qwen2_moe")
    chunked, whole = open_engine(folder, chunk_tokens=8), open_engine(folder, chunk_tokens=64)
    for engine in (chunked, whole):
        engine.tokenizer.eos = frozenset()
    selections = [_half(whole), _half(whole, 1), _half(whole)]
    prompts = [PROMPT, PROMPT[3:], PROMPT[:5]]
    requests = [_auto(s, WATCH, 9, prompt=p) for s, p in zip(selections, prompts, strict=True)]
    exact = _exact(PROMPT, 4)  # a row beside them that has no coverage to speak of
    for engine in (chunked, whole):
        tokens, ends = _run(engine, *requests, exact)
        for selection, prompt, made, end in zip(selections, prompts, tokens, ends, strict=False):
            levels = _levels(whole, selection, [*prompt, *_ids(made)[:-1]])
            assert end.served.level == pytest.approx(min(levels[len(prompt) - 1 :]), abs=1e-5)
            assert (end.served.mode, end.served.escalated) == ("auto", None)
        assert ends[3].served.level is None


def test_what_the_guard_watches_is_answered_as_in_mask_mode(engine: Engine) -> None:
    request = _auto(_half(engine), WATCH)
    [watched], [end] = _run(engine, request)
    [masked], [plain] = _run(engine, replace(request, mode="mask", guard=None))
    assert _ids(watched) == _ids(masked)
    assert end.served.coverage == plain.served.coverage


@pytest.mark.parametrize("restarts", [False, True])
def test_an_alarm_before_the_first_token_gives_exactly_the_exact_answer(engine: Engine, restarts: bool) -> None:
    [tokens], [end] = _run(engine, _auto(_half(engine), ALWAYS, restarts=restarts))
    [wanted], [plain] = _run(engine, _exact(PROMPT, 12))
    assert _ids(tokens) == _ids(wanted)
    assert not any(event.anew for event in tokens)  # nothing was said before
    served = end.served
    assert (end.text, served.mode, served.experts) == (plain.text, "auto", engine.card.layers * engine.card.experts)
    assert served.escalated is not None
    assert (served.escalated.at_token, served.escalated.bound) == (0, 2.0)
    assert served.escalated.coverage == served.level < 1
    assert 0 < served.coverage < 1


def _alarm_late(engine: Engine) -> tuple[GenerationRequest, int]:
    """A request whose level falls below its bound after its first token, and after which."""
    for seed, start in itertools.product(range(20), (0, 1)):
        prompt = tuple(random.Random(seed).choices(range(256), k=7))
        wide = _auto(_half(engine, start), WATCH, prompt=prompt)
        lows = []
        for tokens in range(1, 10):
            [end] = _run(engine, replace(wide, sampling=Sampling(max_tokens=tokens)))[1]
            assert end.served.level is not None
            lows.append(end.served.level)
        falls = [at for at in range(3, 9) if lows[at] < lows[0] - 1e-4 and lows[at] < lows[at - 1] - 1e-4]
        if falls:
            at = falls[0]
            return replace(wide, guard=Guard((lows[at] + lows[at - 1]) / 2)), at
    raise AssertionError("no level of the tiny model ever falls")


def test_after_an_alarm_in_the_answer_the_rest_is_what_the_exact_model_would_say_next(engine: Engine) -> None:
    request, at = _alarm_late(engine)
    [tokens], [end] = _run(engine, request)
    [masked], _ = _run(engine, replace(request, mode="mask", guard=None))
    ids = _ids(tokens)
    assert len(ids) == 12
    assert ids[:at] == _ids(masked)[:at]
    [rest], _ = _run(engine, _exact([*request.prompt, *ids[:at]], 12 - at))
    assert ids[at:] == _ids(rest)
    assert end.served.escalated is not None
    assert end.served.escalated.at_token == at
    assert "".join(event.text for event in tokens) == end.text


def test_where_nobody_has_read_the_first_tokens_an_alarm_begins_the_answer_anew(engine: Engine) -> None:
    request, at = _alarm_late(engine)
    request = replace(request, restarts=True, sampling=replace(request.sampling, logprobs=1))
    [tokens], [end] = _run(engine, request)
    [wanted], [plain] = _run(engine, replace(_exact(request.prompt, 12), sampling=request.sampling))
    begins = [place for place, event in enumerate(tokens) if event.anew]
    assert begins == [at]
    assert _ids(tokens)[at:] == _ids(wanted)
    assert (end.text, end.completion_tokens) == (plain.text, 12)
    assert [score.token for score in end.scores] == [score.token for score in plain.scores]
    assert end.served.escalated is not None
    assert end.served.escalated.at_token == 0


def test_an_escalation_changes_nothing_for_the_rows_beside_it(engine: Engine) -> None:
    late, _ = _alarm_late(engine)
    others = [
        replace(late, mode="mask", guard=None, selection=_half(engine, 1)),
        _auto(_half(engine), WATCH),
        _exact(PROMPT, 7),
    ]
    together, ends = _run(engine, others[0], late, _auto(_half(engine), ALWAYS), *others[1:])
    alone = [_run(engine, other)[0][0] for other in others]
    assert [_ids(together[row]) for row in (0, 3, 4)] == [_ids(tokens) for tokens in alone]
    assert [end.served.escalated is not None for end in ends] == [False, True, True, False, False]
    assert engine.residency().leased == 0


def _slots(folder: Path, slots: int) -> dict[str, int]:
    card = ModelCard.read(folder)
    plan = plan_memory(card, EngineConfig(folder, memory=2**40, chunk_tokens=64, max_batch=4))
    return {"memory": plan.fixed_bytes + slots * plan.slot_bytes, "chunk_tokens": 64, "max_batch": 4}


def test_at_the_budgets_floor_an_escalated_row_waits_for_slots_and_no_newcomer_overtakes_it(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint("qwen2_moe")
    free = open_engine(folder)
    floor = free.card.layers * free.card.top_k
    engine = open_engine(folder, **_slots(folder, floor))
    engine.tokenizer.eos = free.tokenizer.eos = frozenset()
    least = Selection.of([range(engine.card.top_k)] * engine.card.layers)
    mask = GenerationRequest(PROMPT, least, "mask", Sampling(max_tokens=9))
    order: list[int] = []
    made: dict[int, list[int]] = {}
    with Batch(engine) as batch:
        batch.admit(0, mask)
        batch.admit(1, _auto(least, ALWAYS, 5))
        for step in range(200):
            if step == 3:
                assert not batch.fits(least)  # its experts are all there, but somebody waits for a slot
            for event in batch.step():
                assert not isinstance(event, FailedEvent)
                made.setdefault(event.row, [])
                if isinstance(event, TokenEvent):
                    made[event.row].append(event.token)
                else:
                    order.append(event.row)
            if not len(batch):
                break
    assert order == [0, 1]
    assert made[1] == _ids(_run(free, _exact(PROMPT, 5))[0][0])
    assert made[0] == _ids(_run(free, mask)[0][0])
    assert engine.residency().leased == 0


def test_a_background_request_is_finished_exactly_only_where_nothing_needs_to_be_read(engine: Engine) -> None:
    request = _auto(_half(engine), ALWAYS, priority="background")
    engine.evict()
    with pytest.raises(OffTask, match=r"coverage [\d.]+ after 0 tokens, its guard's bound is .* cause no swap"):
        _run(engine, request)
    assert engine.residency().leased == 0
    everything = Selection.of([range(engine.card.experts)] * engine.card.layers)
    with engine.lease(everything):
        paged = engine.bank.paged.experts
    [_], [end] = _run(engine, request)
    assert end.served.escalated is not None
    assert engine.bank.paged.experts == paged


def test_a_router_that_says_no_number_alarms_the_guard(engine: Engine) -> None:
    """0 / 0 and NaN are below no bound, so a comparison alone would let them pass."""
    routing = Routing(engine.board, [_half(engine)], engine.device)
    layers, top_k = engine.card.layers, engine.card.top_k
    routing.begin(1)
    nothing = torch.zeros(1, top_k), torch.arange(top_k).unsqueeze(0)
    routing._seen.extend([nothing] * layers)
    routing.finish()
    assert routing.levels() == routing.coverage() == [0.0]


def test_a_request_cancelled_while_it_is_escalated_leaves_nothing_behind(engine: Engine) -> None:
    request = _auto(_half(engine), ALWAYS)
    with Batch(engine) as batch:
        batch.admit(7, request)
        while engine.residency().leased:  # the alarm gives the lease back
            assert not [event for event in batch.step() if isinstance(event, FinishedEvent)]
        assert len(batch) == 1
        request.cancelled.set()
        [end] = list(batch.step())
        assert isinstance(end, FinishedEvent)
        assert (end.row, end.reason, end.text) == (7, "cancelled", "")
        assert end.served.escalated is not None
        assert not len(batch)


@pytest.mark.parametrize(("mode", "guard"), [("auto", None), ("mask", WATCH), ("exact", WATCH)])
def test_mode_auto_and_a_guard_go_together(engine: Engine, mode: Any, guard: Guard | None) -> None:
    selection = None if mode == "exact" else _half(engine)
    with pytest.raises(InvalidInput, match="guard"):
        GenerationRequest(PROMPT, selection, mode, guard=guard)


def test_a_bound_is_crossed_by_no_more_on_task_items_than_it_says() -> None:
    """Fresh items of the same kind, whatever its distribution: the share below the bound, over many draws."""
    rng = np.random.default_rng(0)
    for items, rate in ((19, 0.05), (48, 0.05), (100, 0.01)):
        crossed = []
        for _ in range(3000):
            drawn = rng.beta(8, 2, size=items + 1)
            guard = draw_guard(drawn[:-1].tolist(), rate)
            assert guard is not None
            assert guard.items == items
            crossed.append(drawn[-1] < guard.bound)
            assert guard.alarm_rate <= rate
        assert np.mean(crossed) == pytest.approx(guard.alarm_rate, abs=3 * math.sqrt(rate / 3000))


@pytest.mark.parametrize("rate", [0.01, 0.02, 0.05, 0.3])
def test_too_few_items_draw_no_bound(rate: float) -> None:
    few = items_needed(rate) - 1
    assert draw_guard([0.5] * few, rate) is None
    assert draw_guard([0.5] * (few + 1), rate) is not None
    assert draw_guard([], rate) is None
