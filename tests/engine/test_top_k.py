"""Fewer experts a token in some layers: against plain transformers with its routers' `top_k` changed layer by layer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.choice import Choice
from engine.engine import Engine
from engine.guard import Guard
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.tiny_config import moe_families
from engine.top_k import can_choose_fewer, choosing
from store.errors import CheckpointError, InvalidInput, UnsupportedFamily
from store.records import Selection, StandIn

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Plain = Callable[[Path], Any]
Draw = Callable[[Engine, random.Random], Selection]

CALLS = (1, 3, 4)  # of 4, in three layers
WEIGHED = [(kind, renormalised) for kind in ("qwen3_moe", "olmoe", "qwen2_moe") for renormalised in (True, False)]
ALL_CALLS = {"phimoe", "gemma4", "gemma4_text"}  # whose routers have no number of experts that a copy could change
ALWAYS = Guard(bound=2.0, alarm_rate=0.5, items=1)  # which no coverage reaches


def blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(getattr(module, "experts", None), "down_proj")]


def changed(model: Any, selection: Selection) -> Any:
    """The stock model with `top_k` set layer by layer, its routers' rows and experts cut to the selection."""
    assert selection.calls is not None
    for block, ids, calls in zip(blocks(model), selection.experts, selection.calls, strict=True):
        router = block.router if hasattr(block, "router") else block.gate
        assert router.top_k >= calls
        router.top_k = calls
        for module in (router, block.experts) if len(ids) < router.num_experts else ():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach()[torch.tensor(ids)], requires_grad=False))
            module.num_experts = len(ids)
    return model


def calls_of(engine: Engine, *numbers: int) -> tuple[int, ...]:
    """As many as the model has layers: the first dense ones of DeepSeek leave it fewer."""
    return numbers[-engine.card.layers :]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def tokens(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(seed))


def ask(first: int, selection: Selection | None, **named: Any) -> GenerationRequest:
    sampling = Sampling(max_tokens=8, ignore_eos=True, logprobs=1)
    prompt = tuple(range(first, first + 9 + first % 5))
    return GenerationRequest(prompt, selection, "exact" if selection is None else "mask", sampling, **named)


def answers(engine: Engine, requests: list[GenerationRequest]) -> dict[int, tuple[list[int], list[float]]]:
    """Of each row its tokens and their logprobs."""
    found: dict[int, tuple[list[int], list[float]]] = {row: ([], []) for row in range(len(requests))}
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            assert event.score is not None
            found[event.row][0].append(event.token)
            found[event.row][1].append(event.score.logprob)
    return found


def same(found: tuple[list[int], list[float]], wanted: tuple[list[int], list[float]]) -> None:
    assert found[0] == wanted[0]
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(wanted[1]), rtol=0, atol=3e-5)


def test_all_experts_with_fewer_calls_are_the_stock_model_with_another_top_k(
    family: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint(family, num_experts_per_tok=4)
    engine = open_engine(folder)
    selection = replace(Selection.whole(engine.card.layers, engine.card.experts), calls=calls_of(engine, *CALLS))
    ids = tokens(2, 13)
    got = engine.forward(ids, torch.ones_like(ids), [selection] * 2)
    torch.testing.assert_close(got, logits(changed(plain_model(folder), selection), ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, logits(plain_model(folder), ids), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(moe_families()))
def test_every_family_that_is_served_makes_one_call_a_layer_as_the_stock_model_does_or_says_that_it_can_t(
    kind: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint(kind)
    try:
        engine = open_engine(folder)
    except (UnsupportedFamily, CheckpointError):
        return  # not served at all: docs/families.md says why, and its test holds it to that
    assert engine.board.fewer == (kind not in ALL_CALLS)
    if kind in ALL_CALLS:
        return
    model, routers = plain_model(folder), {type(joint.router).__name__ for joint in engine.layers._joints}
    for module in model.modules():
        if type(module).__name__ in routers:
            module.top_k = 1
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    ids = tokens(2, 9)
    got = engine.forward(ids, torch.ones_like(ids), [replace(whole, calls=(1,) * engine.card.layers)] * 2)
    torch.testing.assert_close(got, logits(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "renormalised"), WEIGHED)
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_prompt_and_answer_inside_a_selection_are_those_of_the_stock_model(
    kind: str, renormalised: bool, kernel: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Plain,
    random_selection: Draw,
) -> None:  # fmt: skip
    """Logprobs of an answer, token after token, and the stock model's of the same text at once."""
    folder = checkpoint(kind, num_experts_per_tok=4, norm_topk_prob=renormalised)
    engine = open_engine(folder, kernel=kernel)
    selection = replace(random_selection(engine, random.Random(1)), calls=CALLS)
    request = ask(20, selection)
    said, logprobs = answers(engine, [request])[0]
    text = torch.tensor([*request.prompt, *said]).unsqueeze(0)
    wanted = logits(changed(plain_model(folder), selection), text)[0, len(request.prompt) - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(torch.tensor(logprobs), wanted.amax(-1), rtol=0, atol=1e-4)
    assert said == wanted.argmax(-1).tolist()


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_a_row_with_fewer_calls_leaves_the_rows_beside_it_as_they_are(
    kind: str, checkpoint: Checkpoint, open_engine: Open, random_selection: Draw
) -> None:
    """By one call a layer (the first) and by modules: prompts, and routers whose choice has groups or biases."""
    engine = open_engine(checkpoint(kind, num_experts_per_tok=4), max_batch=6)
    one, other = (random_selection(engine, random.Random(seed)) for seed in range(2))
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    low, high = calls_of(engine, 1, 1, 1), calls_of(engine, *CALLS)
    selections = [replace(one, calls=low), one, replace(other, calls=high), None, other, replace(whole, calls=high)]
    ids = tokens(6, 11)
    mask = (torch.arange(11) >= torch.tensor([0, 2, 5, 0, 3, 1]).unsqueeze(1)).long()
    together = engine.forward(ids, mask, selections)
    for row, selection in enumerate(selections):
        alone = engine.forward(ids[row : row + 1], mask[row : row + 1], [selection])[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone[mask[row].bool()], atol=1e-4, rtol=1e-4)
    requests = [ask(10 + 11 * row, selection) for row, selection in enumerate(selections)]
    for row, found in answers(engine, requests).items():
        same(found, answers(engine, [requests[row]])[0])


def test_what_stands_in_for_experts_is_chosen_by_the_router_of_fewer_calls(
    checkpoint: Checkpoint, open_engine: Open, plain_model: Plain, random_selection: Draw
) -> None:
    """Vectors of nothing stand in, so the stock model's choices outside the selection simply add nothing."""
    folder = checkpoint("qwen3_moe", num_experts_per_tok=4)
    engine = open_engine(folder, stand_ins=1)
    nothing = StandIn("zeros", np.zeros((3, engine.card.experts, engine.card.hidden), np.float32))
    selection = replace(random_selection(engine, random.Random(2)), stand_in=nothing, calls=CALLS)
    model = plain_model(folder)
    for block, ids, calls in zip(blocks(model), selection.experts, CALLS, strict=True):
        block.gate.top_k = calls
        outside = sorted(set(range(engine.card.experts)) - set(ids))
        block.experts.down_proj = nn.Parameter(block.experts.down_proj.detach().index_fill(0, torch.tensor(outside), 0))
    ids = tokens(3, 12)
    beside = replace(selection, calls=None)
    got = engine.forward(ids, torch.ones_like(ids), [selection, beside, selection])
    wanted = logits(model, ids)
    torch.testing.assert_close(got[[0, 2]], wanted[[0, 2]], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got[1], wanted[1], atol=1e-2)


def test_a_token_reads_the_experts_that_it_calls_and_no_others(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen3_moe", num_experts_per_tok=4))
    asked: list[int] = []
    real = engine.bank.at_hand

    def counted(layer: int, experts: Any) -> list[int] | None:
        asked.append(sum(expert < engine.card.experts for expert in experts))
        return real(layer, experts)

    monkeypatch.setattr(engine.bank, "at_hand", counted)
    answers(engine, [ask(30, replace(Selection.whole(3, 8), calls=CALLS))])
    assert asked[-9:] == [1, 3, 4] * 3


def test_what_the_guard_stops_is_finished_with_all_calls(
    checkpoint: Checkpoint, open_engine: Open, random_selection: Draw
) -> None:
    engine = open_engine(checkpoint("qwen3_moe", num_experts_per_tok=4))
    selection = replace(random_selection(engine, random.Random(3)), calls=(1, 1, 1))
    exact = answers(engine, [ask(40, None)])[0]
    guarded = replace(ask(40, selection), mode="auto", guard=ALWAYS)
    events = list(engine.generate([guarded]))
    [end] = [event for event in events if isinstance(event, FinishedEvent)]
    assert end.served.escalated is not None
    assert [event.token for event in events if isinstance(event, TokenEvent)] == exact[0]


def test_choices_beyond_a_tokens_calls_are_nobodys() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]] * 3)
    for renormalised in (True, False):
        choice = Choice(4, 3, renormalised, 1.0, torch.float32)
        weights, index = choice.plain(scores, calls=torch.tensor([1, 2, 3]))
        assert index.tolist() == [[0, 4, 4], [0, 2, 4], [0, 2, 1]]
        shares = scores[0].softmax(-1)
        for row, kept in enumerate(([0], [0, 2], [0, 2, 1])):
            wanted = shares[kept] / (shares[kept].sum() if renormalised else 1)
            torch.testing.assert_close(weights[row, : len(kept)], wanted)
            assert not weights[row, len(kept) :].any()


class _Router(nn.Module):
    """Top-k of a softmax, by a number of its own; `lone` leaves a single weight as it is."""

    num_experts = 6

    def __init__(self, name: str = "top_k", lone: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10), requires_grad=False)
        self.name, self.lone = name, lone
        setattr(self, name, 3)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = hidden @ self.weight.t()
        count = getattr(self, self.name)
        weights, index = scores.softmax(-1).topk(count)
        return scores, weights if self.lone and count == 1 else weights / weights.sum(-1, keepdim=True), index


def test_a_router_whose_number_has_no_known_name_makes_no_fewer_calls() -> None:
    for name, works in (("top_k", True), ("num_experts_per_tok", True), ("how_many", False)):
        router = _Router(name)
        assert can_choose_fewer(router, router.forward, 10) is works
    router = _Router()
    assert choosing(router, 1)(torch.ones(1, 10))[2].shape == (1, 1)
    assert router(torch.ones(1, 10))[2].shape == (1, 3)


def test_a_router_that_weighs_a_single_expert_otherwise_keeps_its_own_choice() -> None:
    usual, other = _Router(), _Router(lone=True)
    assert Choice.of(usual, usual.forward, 10) is not None
    assert Choice.of(other, other.forward, 10) is None


def test_calls_that_a_model_can_t_make_are_refused(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen3_moe"))
    whole = Selection.whole(3, 8)
    with pytest.raises(InvalidInput, match="3 experts in a layer; the model's top-k is 2"):
        engine.admission.check(ask(1, replace(whole, calls=(1, 3, 1))))
    monkeypatch.setattr(engine.board, "fewer", False)
    with pytest.raises(UnsupportedFamily, match="no number of experts a token"):
        engine.admission.check(ask(1, replace(whole, calls=(1, 1, 1))))
    for calls in ((1, 1), (1, 0, 1)):
        with pytest.raises(ValueError, match="as many numbers of calls"):
            replace(whole, calls=calls)
