"""A decoder layer in two calls: against the same in small steps, in models, in batches, and who keeps its own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Of
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from engine.attention_block import Trial, positions_of
from engine.block_shape import BlockShape, Turn
from engine.choice import Choice
from engine.engine import Engine
from engine.layer_block import LayerBlock
from engine.layer_shape import LayerShape, Limits, Room
from engine.layerwise import since
from engine.products import Products, instruction_sets
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from store.records import Selection, StandIn

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

WHOLE = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe"]  # a softmax's best, and in the first a shared expert
OTHER = ["dots1", "minimax_m2"]  # sigmoids with a bias, which their own routers choose by; a shared expert in the first
DTYPES = ["float32", "bfloat16"]
Pick = Callable[[Engine, random.Random], Selection]


def blocks(engine: Engine) -> list[LayerBlock]:
    found = [getattr(layer.forward, "__self__", None) for layer in engine.passes.decoders]
    return [one for one in found if isinstance(one, LayerBlock)]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """How many rows went through the calls at a time, of any layer and engine."""
    seen: set[int] = set()
    real = LayerBlock.single

    def counted(self: LayerBlock, x: Tensor, **named: Any) -> Tensor:
        seen.add(len(x))
        return real(self, x, **named)

    monkeypatch.setattr(LayerBlock, "single", counted)
    return seen


def best() -> Products:
    return Products(next(iter(instruction_sets())))


def ask(first: int, selection: Selection | None, tokens: int = 8) -> GenerationRequest:
    mode = "exact" if selection is None else "mask"
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, logprobs=1)
    return GenerationRequest(tuple(range(first, first + 9 + first % 5)), selection, mode, sampling)  # type: ignore[arg-type]


def answers(engine: Engine, requests: list[GenerationRequest]) -> dict[int, Any]:
    """Of each row its tokens, their logprobs, and its coverage."""
    found: dict[int, Any] = {row: ([], [], []) for row in range(len(requests))}
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            assert event.score is not None
            found[event.row][0].append(event.token)
            found[event.row][1].append(event.score.logprob)
        elif isinstance(event, FinishedEvent):
            found[event.row][2].append(event.served.coverage)
    return found


def same(found: dict[int, Any], wanted: dict[int, Any], near: float) -> None:
    for row, (tokens, logprobs, coverage) in wanted.items():
        assert found[row][0] == tokens
        torch.testing.assert_close(torch.tensor(found[row][1]), torch.tensor(logprobs), rtol=0, atol=near)
        assert found[row][2] == pytest.approx(coverage, abs=near)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", WHOLE)
def test_the_first_call_is_its_small_steps_bit_for_bit(
    family: str, dtype: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Norm, attention, sum, norm, product: each by its own call; the choice by the slow truth."""
    engine, own = open_engine(checkpoint(family), dtype=dtype), best()
    positions = positions_of(engine.passes._model)
    assert positions is not None
    forbidden = torch.zeros(2, engine.card.experts, dtype=torch.bool)
    forbidden[0, :4], forbidden[1, 2:5] = True, True
    calls = torch.tensor([2, 1])
    for one in blocks(engine):
        layer, shape = one.layer, one._shape
        choice, trial = shape.choice, Trial.of(shape.block, (1.0, 30.0))
        assert choice is not None
        mine, theirs = (trial.cache(layer.self_attn) for _ in range(2))
        room, free = (
            Room.of(shape, 2),
            (torch.zeros(2, choice.top_k, dtype=choice.dtype), torch.zeros(2, choice.top_k).long()),
        )
        chosen = own.layer(
            shape, trial.x, room, trial.mask, positions, mine.layers[-1], Limits(forbidden, *free, calls)
        )
        before, after = (
            lambda x, norm=norm: own.norm(x, norm.weight, norm.variance_epsilon)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        attended = own.block(shape.block, before(trial.x), positions, trial.mask, theirs.extend(one._at, 1))
        assert torch.equal(room.middle, trial.x + attended)
        assert torch.equal(room.normed, after(room.middle))
        assert all(map(torch.equal, trial.last(mine), trial.last(theirs)))
        logits = own.linear(room.normed[:, 0], shape.kept[2])
        agree(choice, (room.weights, torch.tensor(chosen).view(2, -1)), logits, forbidden, calls)
        agree(choice, free, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe"])
def test_the_second_call_is_its_small_steps_bit_for_bit(
    family: str, dtype: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Chosen experts, their sum, the shared one, the residual stream; one row's choice has no slot."""
    engine, own = open_engine(checkpoint(family), dtype=dtype), best()
    for one in blocks(engine):
        shape, paged = one._shape, one._paged
        assert shape.choice is not None
        assert paged is not None
        assert paged.compiled is not None
        room = Room.of(shape, 2)
        room.middle.copy_(torch.randn(room.middle.shape))
        room.normed.copy_(torch.randn(room.normed.shape))
        room.weights.copy_(torch.rand(room.weights.shape))
        index = torch.tensor([[1, 3], [engine.card.experts, 0]])
        added = paged(room.normed[:, 0], index, room.weights)
        if shape.shared is not None:
            added = added + own.shared(shape.shared, room.normed[:, 0])
        with engine.lease(Selection.of([range(engine.card.experts)] * engine.card.layers)):
            found = paged.onto(room, index.flatten().tolist(), shape.shared)
        assert torch.equal(found, room.middle + added.unsqueeze(1))


def agree(
    choice: Choice, found: tuple[Tensor, Tensor], logits: Tensor, forbidden: Tensor | None = None,
    calls: Tensor | None = None,
) -> None:  # fmt: skip
    weights, index = choice.plain(logits, forbidden, calls)
    assert torch.equal(found[1], index)
    torch.testing.assert_close(found[0], weights)


def test_no_number_among_the_logits_leaves_no_weight_a_number() -> None:
    """So that metering hears of it; the experts that are named exist."""
    own, hidden = best(), 8
    router = torch.randn(5, hidden)
    router[3, 2] = torch.nan
    choice = Choice(5, 2, False, 1.0, torch.float32)
    found = layer_of(own, router, choice, torch.randn(1, 1, hidden))
    assert found[0].isnan().all()
    assert all(0 <= expert < 5 for expert in found[1])


def test_where_too_few_are_allowed_the_rest_is_nobodys() -> None:
    own, router, choice = best(), torch.randn(5, 8), Choice(5, 2, False, 1.0, torch.float32)
    weights, chosen = layer_of(
        own, router, choice, torch.randn(1, 1, 8), torch.tensor([[True, True, True, False, True]])
    )
    assert chosen == [3, 5]
    assert weights.tolist() == [[1.0, 0.0]]


def layer_of(
    own: Products, router: Tensor, choice: Choice, x: Tensor, forbidden: Tensor | None = None
) -> tuple[Tensor, list[int]]:
    """Through a layer of random attention."""
    hidden = x.shape[-1]
    linears = [Of(weight=torch.randn(hidden, hidden), bias=None) for _ in range(4)]
    block = BlockShape.of(linears, [None, None], 4, 0.5, Turn(4, torch.float32))
    assert block is not None
    norm = Of(weight=torch.ones(hidden), eps=1e-6)
    shape, trial = LayerShape.of(block, norm, norm, router, choice), Trial.of(block, (1.0, 1.0))
    room, cache = Room.of(shape, 1), trial.cache(Of(layer_idx=0)).layers[0]
    cache.batch_size = 1
    positions = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    chosen = own.layer(shape, x, room, None, positions, cache, Limits(forbidden, None, None))
    assert chosen is not None
    return room.weights, chosen


@pytest.mark.parametrize("family", WHOLE + OTHER)
def test_models_say_the_same_as_by_torch_and_meter_the_same(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Pick
) -> None:
    ours = open_engine(checkpoint(family), max_batch=4)
    plain = open_engine(checkpoint(family), max_batch=4, kernel="torch")
    assert len(blocks(ours)) == len(ours.passes.decoders)
    moe = [one._shape for one in blocks(ours) if one._paged is not None]
    assert len(moe) == ours.card.layers
    assert all(shape.summed for shape in moe)
    assert all((shape.choice is not None) == (family in WHOLE) for shape in moe)
    assert not blocks(plain)
    selection = random_selection(ours, random.Random(3))
    for request in (ask(10, selection), ask(20, None)):
        same(answers(ours, [request]), answers(plain, [request]), 2e-5)


def test_vectors_that_stand_in_for_experts_are_added_behind_the_first_call(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Pick, rows: set[int]
) -> None:
    folder = checkpoint("dots1")
    ours, plain = open_engine(folder, stand_ins=1), open_engine(folder, stand_ins=1, kernel="torch")
    card, kept = ours.card, random_selection(ours, random.Random(3)).experts
    vectors = torch.randn(card.layers, card.experts, card.hidden).numpy()
    request = ask(10, Selection(kept, StandIn("random", vectors)))
    same(answers(ours, [request]), answers(plain, [request]), 2e-5)
    assert rows == {1}


@pytest.mark.parametrize("many", [4, 8])
@pytest.mark.parametrize("family", WHOLE + OTHER)
def test_a_row_of_a_mixed_batch_is_that_row_alone(
    family: str,
    many: int,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    random_selection: Pick,
    rows: set[int],
) -> None:
    engine, rng = open_engine(checkpoint(family), max_batch=many), random.Random(4)
    firsts = range(10, 10 + 11 * (many - 1), 11)
    requests = [ask(first, random_selection(engine, rng)) for first in firsts] + [ask(44, None)]
    alone = {row: answers(engine, [request])[0] for row, request in enumerate(requests)}
    assert rows == {1}
    same(answers(engine, requests), alone, 2e-5)
    assert many in rows


@pytest.mark.parametrize("family", WHOLE + OTHER)
def test_eight_rows_in_16_bits_go_through_the_calls_where_a_layer_is_small(
    family: str,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    random_selection: Pick,
    rows: set[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run() -> None:
        engine, rng = open_engine(checkpoint(family, dtype="bfloat16"), max_batch=8), random.Random(4)
        answers(engine, [ask(first, random_selection(engine, rng)) for first in range(10, 90, 10)])

    run()
    assert 8 in rows
    rows.clear()
    monkeypatch.setattr("engine.kernels.FEW_WEIGHTS", 1)  # no layer is small
    monkeypatch.setattr("engine.kernels.FEW_PAIRS", 4)
    run()
    assert 8 not in rows


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_what_has_to_be_paged_comes_in_between_the_two_calls(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    folder, limits = checkpoint(family), {"max_batch": 1, "max_context": 64, "chunk_tokens": 16}
    plan = open_engine(folder, **limits).plan
    whole = open_engine(folder)
    small = open_engine(folder, memory=plan.fixed_bytes + 6 * plan.slot_bytes, **limits)
    assert small.plan.slots == 6
    before = small.bank.paged.experts
    same(answers(small, [ask(10, None, 20)]), answers(whole, [ask(10, None, 20)]), 2e-5)
    assert small.bank.paged.experts > before


def test_layers_that_do_something_else_keep_their_own(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    scaled = open_engine(checkpoint("granitemoe", residual_multiplier=0.5))
    assert not blocks(scaled)
    assert scaled.kernel.endswith("0 of 3 decoder layers in two calls")
    assert not blocks(open_engine(checkpoint("deepseek_v3")))  # latent attention
    assert "3 of 3 decoder layers" in open_engine(checkpoint("olmoe")).kernel


def _scaled_shared(block: Any, x: Tensor) -> Tensor:
    return cast("Tensor", _theirs(block, x) + 0.1 * block.shared_expert(x))


def _scaled_experts(block: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, x.shape[-1])
    _, weights, index = block.gate(flat)
    return cast("Tensor", _theirs(block, x) + 0.1 * block.experts(flat, index, weights).view(x.shape))


def _clipped(block: Any, x: Tensor) -> Tensor:
    """Only the inside of a shared expert that is fed loudly shows it."""
    made = dict(block.shared_expert.named_children())
    x = x.view(-1, x.shape[-1])
    inner = made["act_fn"](made["gate_proj"](x)).clamp(max=7) * made["up_proj"](x)
    shared = block.shared_expert_gate(x).sigmoid() * made["down_proj"](inner)
    _, weights, index = block.gate(x)
    return cast("Tensor", (block.experts(x, index, weights) + shared).view(len(x), 1, -1))


def _without_gate(block: Any, x: Tensor) -> Tensor:
    flat = x.view(-1, x.shape[-1])
    _, weights, index = block.gate(flat)
    return cast("Tensor", (block.experts(flat, index, weights) + block.shared_expert(flat)).view(x.shape))


_theirs = Qwen2MoeSparseMoeBlock.forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", [_scaled_shared, _scaled_experts, _clipped, _without_gate])
def test_a_feed_forward_that_does_something_else_with_its_experts_keeps_its_own(
    other: Callable[[Any, Tensor], Tensor],
    dtype: str,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def summed_here() -> list[bool]:
        return [one._shape.summed for one in blocks(open_engine(checkpoint("qwen2_moe"), dtype=dtype))]

    assert all(summed_here())
    monkeypatch.setattr(Qwen2MoeSparseMoeBlock, "forward", other)
    assert not any(summed_here())


def test_a_shared_expert_that_is_small_beside_the_chosen_ones_is_tried_too(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2MoeSparseMoeBlock, "forward", _scaled_shared)
    small = open_engine(checkpoint("qwen2_moe", std=0.01), dtype="bfloat16")
    assert not any(one._shape.summed for one in blocks(small))


def test_a_layer_that_is_stepped_over_is_ours_again_afterwards(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint("olmoe"))
    with since(engine.passes.decoders, 2, None):
        assert len(blocks(engine)) == 1
    assert len(blocks(engine)) == 3
