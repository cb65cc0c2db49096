"""Many tokens with rows across the lanes: products, attention and whole layers, each against the slow truth in float64,
and every token against itself alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.attention_block import positions_of
from engine.choice import Choice
from engine.engine import Engine
from engine.layer_block import LayerBlock
from engine.layer_shape import Limits
from engine.products import PAIRS, instruction_sets
from engine.requests import FinishedEvent, GenerationRequest, Sampling, TokenEvent
from engine.scratch import Scratch
from engine.wide import PromptRoom, Wide
from store.records import Selection, StandIn

pytestmark = pytest.mark.skipif(PAIRS not in instruction_sets(), reason=f"the processor has no {PAIRS}")

Pick = Callable[[Engine, random.Random], Selection]
Threads = Callable[[int], None]
FAMILIES = [
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "minimax_m2",
]
NEAR = 0.02  # of the largest number: eight bits of each, and shares of attention that are rounded once more


def wide() -> Wide:
    return Wide(Scratch())


def made(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def near(found: Tensor, wanted: Tensor, share: float = NEAR) -> None:
    assert found.isfinite().all()
    assert float((found.double() - wanted).abs().max()) <= share * float(wanted.abs().max())


@pytest.mark.parametrize(("rows", "columns", "outputs"), [
    (33, 64, 48), (1, 2, 1), (64, 130, 7), (65, 96, 97), (200, 512, 200), (17, 34, 100), (130, 1000, 193),
])  # fmt: skip
def test_a_product_is_that_of_float64_and_a_row_is_the_same_alone(rows: int, columns: int, outputs: int) -> None:
    x, weight, bias = made(rows, columns), made(outputs, columns + 4)[:, :columns], made(outputs)
    own = wide()
    for with_bias in (None, bias):
        found = own.linear(x, weight, with_bias)
        wanted = x.double() @ weight.double().T + (0 if with_bias is None else with_bias.double())
        near(found, wanted, 2**-8)
        for row in {0, rows // 2, rows - 1}:
            assert own.linear(x[row : row + 1], weight, with_bias).equal(found[row : row + 1])


def test_threads_change_no_bit(threads: Threads) -> None:
    x, weight, own = made(150, 640), made(1000, 640), wide()
    q, keys, values, mask = cache(2, 70, 200, 8, 2, 32, 32)
    found = []
    for count in (1, 2):
        threads(count)
        found.append((own.linear(x, weight), own.attend(q, keys, values, mask, 0.2)))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))


def test_what_comes_in_no_pairs_goes_to_torch() -> None:
    own = wide()
    assert own.multiplies(made(40, 6), made(3, 6))
    assert not own.multiplies(made(40, 5), made(3, 5))
    assert not own.multiplies(made(40, 6).float(), made(3, 6).float())
    assert not own.multiplies(made(40, 6), made(6, 3).T)


def cache(
    rows: int, new: int, columns: int, asking: int, heads: int, width: int, value_width: int, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [B, S, A, D], keys and values [B, N, C, D or V], each row's padding longer than the one before: bool
    [B, 1, S, C]."""
    q = made(rows, new, asking, width)
    keys, values = made(rows + 1, heads, columns + 5, width), made(rows + 1, heads, columns + 9, value_width, seed=1)
    mask = torch.ones(new, columns, dtype=torch.bool).tril(columns - new)
    if window is not None:
        mask &= ~torch.ones(new, columns, dtype=torch.bool).tril(columns - new - window)
    mask = mask.expand(rows, 1, new, columns).clone()
    for row in range(rows):
        mask[row, ..., : 7 * row] = False
    return q, keys[1:, :, :columns], values[1:, :, :columns], mask


def plain(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """[B, S, A, V] in float64, 0 where a token sees nothing."""
    groups = q.shape[2] // keys.shape[1]
    keys, values = (one.double().repeat_interleave(groups, 1) for one in (keys, values))
    scores = q.double().transpose(1, 2) @ keys.transpose(2, 3) * scale  # [B, A, S, C]
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    shares = scores.softmax(-1).nan_to_num()[..., : keys.shape[2]]
    return (shares @ values).transpose(1, 2)


SHAPES = [
    (1, 100, 100, 4, 4, 32, 32, None), (2, 40, 300, 8, 2, 64, 64, None), (3, 17, 38, 4, 1, 16, 48, None),
    (1, 3, 700, 6, 3, 128, 128, 100), (2, 90, 90, 2, 2, 50, 34, 9), (1, 1, 33, 40, 2, 64, 64, None),
    (8, 9, 58, 2, 1, 24, 10, None), (1, 600, 600, 2, 1, 32, 32, None),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sunk", [False, True])
def test_attention_is_that_of_float64(shape: tuple[Any, ...], sunk: bool) -> None:
    q, keys, values, mask = cache(*shape)
    sinks = made(q.shape[2]).float() * 2 if sunk else None
    own, scale = wide(), shape[5] ** -0.5
    assert own.attends(q.transpose(1, 2), keys, values, mask)
    near(own.attend(q, keys, values, mask, scale, sinks), plain(q, keys, values, mask, scale, sinks))
    if shape[1] == shape[2] and shape[7] is None:
        every = torch.ones_like(mask).tril()
        assert own.attends(q.transpose(1, 2), keys, values, None)
        near(own.attend(q, keys, values, None, scale, sinks), plain(q, keys, values, every, scale, sinks))


def test_a_token_depends_on_no_other_row_nor_on_what_it_does_not_see() -> None:
    """To the bit: alone, behind more padding, beside fewer tokens after it, and with anything in columns that are
    hidden."""
    q, keys, values, mask = cache(3, 90, 290, 4, 2, 32, 48)
    own = wide()
    whole = own.attend(q, keys, values, mask, 0.2)
    for row in range(3):
        alone = own.attend(q[row : row + 1], keys[row : row + 1], values[row : row + 1], mask[row : row + 1], 0.2)
        assert alone[0].equal(whole[row])
    row, hidden = 2, 14  # the row's padding
    less = own.attend(q[row:], keys[row:, :, hidden:], values[row:, :, hidden:], mask[row:, ..., hidden:], 0.2)
    assert less[0].equal(whole[row])
    fewer = own.attend(q[:, :31], keys[:, :, :231], values[:, :, :231], mask[:, :, :31, :231].contiguous(), 0.2)
    assert fewer.equal(whole[:, :31])
    keys, values = keys.clone(), values.clone()
    keys[row, :, :hidden], values[row, :, :hidden] = torch.nan, torch.inf
    assert own.attend(q, keys, values, mask, 0.2)[row].equal(whole[row])


def test_a_token_that_sees_nothing_gets_nothing_and_one_without_numbers_shows_it() -> None:
    q, keys, values, mask = cache(1, 20, 20, 2, 2, 16, 16)
    mask[..., :5] = False
    found = wide().attend(q, keys, values, mask, 0.3)
    assert not found[0, :5].any()
    q[0, 11, 1, 3] = torch.nan
    found = wide().attend(q, keys, values, mask, 0.3)
    assert found[0, 11, 1].isnan().all()
    assert found[0, 11, 0].isfinite().all()
    assert found[0, 12:].isfinite().all()


def test_a_mask_with_gaps_goes_to_torch() -> None:
    q, keys, values, mask = cache(2, 20, 40, 2, 2, 16, 16)
    own = wide()
    assert own.sees(mask, 2, 20, 40)
    mask[1, 0, 7, 19] = False
    assert not own.sees(mask, 2, 20, 40)
    assert own.sees(mask[:1], 2, 20, 40)  # one for all rows
    assert not own.attends(q.transpose(1, 2), keys, values, mask)
    assert not own.attends(q.transpose(1, 2), keys, values, None)  # fewer tokens than columns: who sees what?
    assert not own.sees(mask[:1].float(), 2, 20, 40)


def blocks(engine: Engine) -> list[LayerBlock]:
    assert engine.passes._step is not None
    found: list[LayerBlock] = list(engine.passes._step._blocks)
    return found


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_a_layer_is_that_of_its_module_and_leaves_the_same_in_the_cache(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Attention and norms by torch's own forwards; the choice by the slow truth, for rows with limits of their own of
    which one chooses fewer experts, and with padding."""
    engine, rows, new, before = open_engine(checkpoint(family, dtype="bfloat16"), max_batch=3), 3, 21, 6
    rotary = engine.passes._model.get_decoder().rotary_emb
    forbidden = torch.rand(rows, engine.card.experts, generator=torch.Generator().manual_seed(1)).argsort(1) >= 5
    calls, valid = torch.tensor([2, 1, 2]), torch.rand(rows * new, generator=torch.Generator().manual_seed(2)) > 0.2
    for one in blocks(engine):
        shape, layer = one._shape, one.layer
        choice = shape.choice
        assert choice is not None
        assert one.wide is not None
        x = made(rows, new, shape.block.hidden, seed=3)
        mask = torch.ones(new, before + new, dtype=torch.bool).tril(before).expand(rows, 1, -1, -1).clone()
        mask[1, ..., :4] = False
        turned = rotary(x, torch.arange(before, before + new).expand(rows, new))
        window = engine.kv.window(0, rows)
        mine = window.layers[one._at]
        keys, values = window.extend(one._at, before)
        keys.copy_(made(*keys.shape)), values.copy_(made(*values.shape))
        earlier, (step, parts) = (keys.clone(), values.clone()), (layer.self_attn, layer)
        tokens = rows * new
        free = torch.zeros(tokens, choice.top_k, dtype=choice.dtype), torch.zeros(tokens, choice.top_k).long()
        room = PromptRoom.of(shape, tokens)
        one.wide.prompt(shape, x, room, mask, turned, mine, Limits(forbidden, *free, calls), valid)
        keys, values = window.extend(one._at, 0)
        ours = keys[:, :, before:].clone(), values[:, :, before:].clone()
        assert keys[:, :, :before].equal(earlier[0])
        window.layers[one._at].length = before
        attended, _ = step(
            parts.input_layernorm(x), position_embeddings=turned, attention_mask=mask, past_key_values=window
        )
        keys, values = window.extend(one._at, 0)
        near(ours[0], keys[:, :, before:].double())
        near(ours[1], values[:, :, before:].double())
        middle = (x + attended).view(tokens, -1)
        near(room.middle, middle.double())
        near(room.normed, parts.post_attention_layernorm(room.middle).double(), 2**-7)
        logits = one.wide.linear(room.normed, shape.kept[2])
        agree(choice, free, logits)
        owner = torch.arange(rows).repeat_interleave(new)
        weights, index = choice.plain(logits, forbidden[owner], calls[owner])
        assert room.index.equal(index.masked_fill(~valid.unsqueeze(1), engine.card.experts))
        torch.testing.assert_close(room.weights, weights)


def agree(choice: Choice, found: tuple[Tensor, Tensor], logits: Tensor) -> None:
    weights, index = choice.plain(logits)
    assert found[1].equal(index)
    torch.testing.assert_close(found[0], weights)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_layers_end_is_the_sum_of_its_parts(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine, tokens = open_engine(checkpoint(family, dtype="bfloat16")), 45
    for one in blocks(engine):
        shape, paged, own = one._shape, one._paged, one.wide
        assert shape.choice is not None
        assert own is not None
        assert paged is not None
        hidden, top_k, nobody = shape.block.hidden, shape.choice.top_k, engine.card.experts
        x, middle = made(tokens, hidden), made(tokens, hidden, seed=1)
        made_by = torch.Generator().manual_seed(4)
        outputs = torch.randn(tokens * top_k, hidden, generator=made_by)
        weights = torch.rand(tokens, top_k, generator=made_by)
        index = torch.randint(nobody + 1, (tokens, top_k), generator=made_by)
        outputs[index.flatten() == nobody] = torch.nan  # nobody wrote there
        called = outputs.nan_to_num().view(tokens, top_k, hidden).double()
        wanted = (called * weights.unsqueeze(2).double()).sum(1)
        near(own.ending(outputs, index, nobody, weights, x), wanted, 2**-8)
        if shape.shared is not None:
            wanted += shape.shared.plain(x).double()
        near(own.ending(outputs, index, nobody, weights, x, shape.shared, middle), wanted + middle.double())


def test_no_number_among_the_logits_leaves_no_weight_a_number(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """So that metering hears of it; the experts that are named exist."""
    engine = open_engine(checkpoint("olmoe", dtype="bfloat16"))
    one, new = blocks(engine)[0], 20
    positions = positions_of(engine.passes._model)
    assert positions is not None
    assert one.wide is not None
    for number in (torch.nan, torch.inf):
        x = made(1, new, one._shape.block.hidden)
        x[0, 7, 3] = number
        window, room = engine.kv.window(0, 1), PromptRoom.of(one._shape, new)
        turned = tuple(each[:1].expand(1, new, -1).contiguous() for each in positions)
        mask = torch.ones(1, 1, new, new, dtype=torch.bool).tril()
        one.wide.prompt(one._shape, x, room, mask, turned, window.layers[0], Limits(None, None, None), None)  # type: ignore[arg-type]
        assert room.weights[7].isnan().all()
        assert ((room.index >= 0) & (room.index < engine.card.experts)).all()


def ask(length: int, selection: Selection | None, tokens: int = 3, seed: int = 0) -> GenerationRequest:
    rng = random.Random(100 * length + seed)
    prompt = tuple(rng.randrange(3, 60) for _ in range(length))
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, logprobs=1)
    return GenerationRequest(prompt, selection, "exact" if selection is None else "mask", sampling)


def answers(engine: Engine, requests: list[GenerationRequest]) -> list[tuple[list[float], float]]:
    """Of each row the log-probabilities of its own tokens and its coverage."""
    found: list[Any] = [[[], 0.0] for _ in requests]
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            assert event.score is not None
            found[event.row][0].append(event.score.logprob)
        elif isinstance(event, FinishedEvent):
            found[event.row][1] = event.served.coverage
    return [(logprobs, coverage) for logprobs, coverage in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_of_every_kind_of_family_are_read_as_by_torch(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Pick
) -> None:
    """The first token's distribution and what was metered on the way, masked and free, in chunks and batches. Where one
    logit of a router rounds to another side a token goes elsewhere: so it is compared in float32 terms, loosely."""
    folder = checkpoint(family, dtype="bfloat16")
    ours, theirs = (
        open_engine(folder, max_batch=4, chunk_tokens=32, max_context=128, kernel=kernel) for kernel in ("own", "torch")
    )
    rng = random.Random(5)
    selections = [random_selection(ours, rng), random_selection(ours, rng), None]
    requests = [ask(length, selections[place % 3], tokens=1) for place, length in enumerate((50, 9, 70, 33))]
    for (found, covered), (wanted, plainly) in zip(answers(ours, requests), answers(theirs, requests), strict=True):
        assert found == pytest.approx(wanted, abs=0.1)
        assert covered == pytest.approx(plainly, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_beside_others_is_that_prompt_alone(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Pick
) -> None:
    engine, rng = open_engine(checkpoint(family, dtype="bfloat16"), max_batch=6, max_context=128), random.Random(6)
    picked = [random_selection(engine, rng) for _ in range(3)]
    requests = [ask(20 + 3 * place, [*picked, None][place % 4], seed=place) for place in range(6)]
    together = answers(engine, requests)
    for request, (found, covered) in zip(requests, together, strict=True):
        [(alone, alone_covered)] = answers(engine, [request])
        assert found[0] == pytest.approx(alone[0], abs=0.05)
        assert covered == pytest.approx(alone_covered, abs=0.02)


def test_memory_of_calls_is_kept_and_grows_to_the_largest() -> None:
    scratch = Scratch()
    own, weight = Wide(scratch), made(8, 64)
    assert scratch.nbytes == 0
    own.linear(made(40, 64), weight)
    few = scratch.nbytes
    own.linear(made(400, 64), weight)
    many = scratch.nbytes
    own.linear(made(40, 64), weight)
    assert 0 < few < many == scratch.nbytes
    first, again = scratch.outputs(3, 5), scratch.outputs(2, 4)
    assert first.data_ptr() == again.data_ptr()
    assert again.shape == (2, 4)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3"])
def test_what_calls_keep_is_within_what_the_plan_sets_aside(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """For activations, and for the kernels that torch would compile in their place."""
    engine = open_engine(checkpoint(family, dtype="bfloat16"), max_context=512, chunk_tokens=128, memory=400 << 20)
    answers(engine, [ask(500, None)])
    compiled = engine.layers._experts[0].compiled
    assert compiled is not None
    kept = compiled.own.scratch.nbytes
    assert 0 < kept <= engine.plan.workspace_bytes + engine.plan.kernel_bytes
    answers(engine, [ask(30, None)])
    assert compiled.own.scratch.nbytes == kept


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_a_long_exact_prompt_under_a_budget_is_read_as_with_all_experts_there(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Layer by layer, experts paged one by one: the first token's probability, for several prompts at once."""
    folder, limits = checkpoint(family, dtype="bfloat16"), {"max_batch": 4, "max_context": 96, "chunk_tokens": 32}
    whole = open_engine(folder, **limits)
    squeezed = open_engine(folder, memory=whole.plan.floor_bytes, **limits)
    requests = [ask(length, None, tokens=1) for length in (70, 50, 64)]
    for (found, _), (wanted, _) in zip(answers(squeezed, requests), answers(whole, requests), strict=True):
        assert found == pytest.approx(wanted, abs=0.05)


def test_a_prompt_with_stand_ins_for_experts_that_are_left_out_is_read_as_by_torch(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], random_selection: Pick
) -> None:
    folder = checkpoint("qwen2_moe", dtype="bfloat16")
    ours, theirs = (open_engine(folder, stand_ins=1, max_batch=2, kernel=kernel) for kernel in ("own", "torch"))
    card, kept = ours.card, random_selection(ours, random.Random(3)).experts
    vectors = torch.randn(card.layers, card.experts, card.hidden, generator=torch.Generator().manual_seed(1)).numpy()
    requests = [ask(30, Selection(kept, StandIn("random", vectors)), tokens=1), ask(41, None, tokens=1)]
    for (found, covered), (wanted, plainly) in zip(answers(ours, requests), answers(theirs, requests), strict=True):
        assert found == pytest.approx(wanted, abs=0.1)
        assert covered == pytest.approx(plainly, abs=0.03)
