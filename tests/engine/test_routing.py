"""Coverage, refusals of selections, and the group-limited gate's choices."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.restriction import GroupLimitedGate
from engine.routing import WAITING, Routing
from store.errors import InvalidInput
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


class _Recorder:
    """Keeps what the unrestricted router said, by layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def residual(self, layer: int, h: Tensor) -> None: ...

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        self.seen.append((weights, index))

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None: ...

    def combined(self, layer: int, y: Tensor) -> None: ...


def test_coverage_is_the_mean_share_of_the_free_routers_weight_inside_the_selection(
    family: str,
    checkpoint: Checkpoint,
    open_engine: Open,
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:
    """In the first layer the residual is the same with and without the restriction, so a free pass gives the truth."""
    engine = open_engine(checkpoint(family, num_hidden_layers=1, first_k_dense_replace=0, **_one_layer(family)))
    rng = random.Random(2)
    ids = torch.randint(0, 256, (3, 10))
    mask = (torch.arange(10) >= torch.tensor([[0], [4], [9]])).long()
    selections: list[Selection | None] = [random_selection(engine, rng), None, random_selection(engine, rng)]
    recorder = _Recorder()
    engine.forward(ids, mask, [None] * 3, recorder)
    [(weights, index)] = recorder.seen
    routing = Routing(engine.board, selections, engine.device)
    with torch.inference_mode():
        for selection in selections:
            if selection is not None:
                assert len(selection) <= engine.plan.slots
        engine.passes.whole(ids, mask, routing)
    for row, selection in enumerate(selections):
        shares = []
        for column in range(10):
            if mask[row, column]:
                token = row * 10 + column
                inside = [selection is None or int(e) in selection.experts[0] for e in index[token]]
                shares.append(float((weights[token] * torch.tensor(inside)).sum() / weights[token].sum()))
        assert routing.coverage()[row] == pytest.approx(sum(shares) / len(shares), abs=1e-5)


def _one_layer(family: str) -> dict[str, list[str]]:
    return {"layer_types": ["full_attention"]} if family in ("gpt_oss", "qwen3_next") else {}


@pytest.mark.parametrize("tokens", [5, WAITING, WAITING + 9])
def test_tokens_whose_coverage_is_asked_for_late_count_as_those_asked_for_at_once(
    tokens: int,
    checkpoint: Checkpoint,
    open_engine: Open,
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:
    """A prompt with padding, single tokens, and rows that leave in between."""
    engine, rng = open_engine(checkpoint("olmoe")), random.Random(3)
    selections = [random_selection(engine, rng), None, random_selection(engine, rng)]
    at_once, late = (Routing(engine.board, selections, engine.device) for _ in range(2))
    prompt, mask = torch.randint(0, 256, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, :4] = 0
    with torch.inference_mode():
        for routing in (at_once, late):
            engine.passes.whole(prompt, mask, routing)
        for number in range(tokens):
            column = torch.randint(0, 256, (at_once._rows, 1))
            for routing in (at_once, late):
                engine.passes.whole(column, torch.ones_like(column), routing)
            at_once.levels()
            if number == 3:
                at_once, late = (one.select([2, 0], [selections[2], selections[0]]) for one in (at_once, late))
        engine.passes.whole(prompt[:2], mask[:2], late)  # what waits is metered before a pass of another width
        engine.passes.whole(prompt[:2], mask[:2], at_once)
    assert late.levels() == pytest.approx(at_once.levels(), abs=1e-9)
    assert late.coverage() == pytest.approx(at_once.coverage(), abs=1e-9)
    assert max(late.coverage()) < 1


def test_coverage_of_a_whole_selection_and_of_a_free_row_is_one(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("olmoe"))
    routing = Routing(engine.board, [Selection.whole(3, 8), None], engine.device)
    with torch.inference_mode():
        engine.passes.whole(torch.randint(0, 256, (2, 5)), torch.ones(2, 5, dtype=torch.long), routing)
    assert routing.coverage() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection.of([[0, 1]] * 2), "2 layers, the model has 3"),
        (Selection.of([[0, 1], [3], [0, 1]]), "layer 1 of the selection has 1 experts"),
        (Selection.of([[0, 1], [], [0, 1]]), "layer 1 of the selection has 0 experts"),
        (Selection.of([[0, 1], [0, 1], [0, 8]]), "layer 2 .* the highest is 8"),
    ],
)
def test_a_selection_that_does_not_match_the_model_is_refused(
    selection: Selection, message: str, checkpoint: Checkpoint, open_engine: Open
) -> None:
    engine = open_engine(checkpoint("olmoe"))
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(InvalidInput, match=message) as refusal:
        engine.forward(ids, torch.ones_like(ids), [selection])
    assert refusal.value.param == "selection"
    with pytest.raises(InvalidInput, match=message), engine.lease(selection):
        pytest.fail("a selection of another model must not be leased")


def test_sliced_routers_are_kept_for_a_bounded_number_of_selections(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("olmoe"), max_batch=2)
    ids = torch.zeros(1, 3, dtype=torch.long)
    for expert in range(2, 8):
        engine.forward(ids, torch.ones_like(ids), [Selection.of([[0, 1, expert]] * 3)])
    assert len(engine.board._cache) == 2


@pytest.mark.parametrize("seed", range(5))
def test_a_group_limited_gate_never_routes_to_a_forbidden_expert(seed: int) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    gate = GroupLimitedGate(4, 2, 3, 2.5, True, torch.randn(16, generator=generator) * 2)
    for _ in range(20):
        ids = sorted(rng.sample(range(16), rng.randint(3, 16)))
        allowed = torch.zeros(16, dtype=torch.bool).index_fill_(0, torch.tensor(ids), True)
        weights, index = gate(torch.randn(50, 16, generator=generator) * 3, allowed)
        assert set(index.flatten().tolist()) <= set(ids)
        assert all(len(set(row)) == 3 for row in index.tolist())
        torch.testing.assert_close(weights.sum(-1), torch.full((50,), 2.5))
