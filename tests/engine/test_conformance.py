"""Every family against plain transformers: the whole, selection and row rules, and exact mode at the floor."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.plan import plan_memory
from store.records import Selection

Plain = Callable[[Path], Any]
Draw = Callable[[Engine, random.Random], Selection]
Open = Callable[..., Engine]


def _batch(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens, padded on the left by a random amount."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, width), generator=generator)
    starts = torch.randint(0, width // 2, (rows, 1), generator=generator)
    return ids, (torch.arange(width) >= starts).long()


def _plain_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.inference_mode():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits: Tensor = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    return logits.float()


def _moe_blocks(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "experts") and hasattr(module.experts, "down_proj")]


def _router(block: Any) -> Any:
    return block.router if hasattr(block, "router") else block.gate


def _slice(model: Any, selection: Selection) -> Any:
    """The plain model with router rows and experts cut away, so that nothing but the selection is left of it."""
    for block, ids in zip(_moe_blocks(model), selection.experts, strict=True):
        kept = torch.tensor(ids)
        for module in (block.experts, _router(block)):
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(parameter.detach()[kept], requires_grad=False))
            module.num_experts = len(ids)
    return model


def _deepseek_by_hand(router: Any, allowed: set[int]) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The group-limited gate one token at a time, in plain Python."""

    def one(logits: list[float]) -> tuple[list[float], list[int]]:
        scores = [1 / (1 + torch.tensor(-value).exp().item()) for value in logits]
        choice = {e: scores[e] + router.e_score_correction_bias[e].item() for e in allowed}
        size = router.num_experts // router.num_group
        groups = [[e for e in range(g * size, (g + 1) * size) if e in allowed] for g in range(router.num_group)]
        ranked = sorted(
            (g for g in groups if g), key=lambda g: sum(sorted((choice[e] for e in g), reverse=True)[:2]), reverse=True
        )
        candidates: list[int] = []
        for rank, group in enumerate(ranked):
            if rank < router.topk_group or len(candidates) < router.top_k:
                candidates += group
        index = sorted(candidates, key=lambda e: choice[e], reverse=True)[: router.top_k]
        total = sum(scores[e] for e in index)
        return [scores[e] / total * router.routed_scaling_factor for e in index], index

    def forward(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, router.hidden_dim).float() @ router.weight.float().T
        routed = [one(row) for row in logits.tolist()]
        return logits, torch.tensor([w for w, _ in routed]), torch.tensor([i for _, i in routed])

    return forward


def _restricted(model: Any, family: str, selection: Selection) -> Any:
    if family != "deepseek_v3":
        return _slice(model, selection)
    for block, ids in zip(_moe_blocks(model), selection.experts, strict=True):
        block.gate.forward = _deepseek_by_hand(block.gate, set(ids))
    return model


def _floor(folder: Path, engine: Engine, **fields: Any) -> int:
    from engine.config import EngineConfig

    config = EngineConfig(folder, memory=2**40, **fields)
    return plan_memory(engine.card, config).floor_bytes


def test_a_selection_of_all_experts_is_the_plain_model(
    family: str, checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint(family, max_shard_size="20KB")
    engine = open_engine(folder)
    ids, mask = _batch(3, 17)
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    wanted = _plain_logits(plain_model(folder), ids, mask)
    torch.testing.assert_close(
        engine.forward(ids, mask, [whole] * 3)[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4
    )


def test_exact_mode_at_the_floor_is_the_plain_model_and_reads_each_needed_expert_once_a_layer(
    family: str, checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint(family)
    engine = open_engine(folder)
    small = open_engine(folder, memory=_floor(folder, engine))
    assert small.plan.slots == small.card.layers * small.card.top_k
    ids, mask = _batch(2, 19, seed=1)
    wanted = _plain_logits(plain_model(folder), ids, mask)
    torch.testing.assert_close(
        small.forward(ids, mask, [None, None])[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4
    )
    assert small.bank.paged.experts <= small.card.layers * small.card.experts


def test_a_selection_is_the_plain_model_with_router_and_experts_sliced(
    family: str, checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain, random_selection: Draw
) -> None:
    folder = checkpoint(family)
    engine = open_engine(folder)
    rng = random.Random(5)
    for seed in range(4):
        selection = random_selection(engine, rng)
        ids, mask = _batch(2, 15, seed)
        wanted = _plain_logits(_restricted(plain_model(folder), family, selection), ids, mask)
        got = engine.forward(ids, mask, [selection] * 2)
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


def test_each_row_of_a_mixed_batch_equals_that_row_alone(
    family: str, checkpoint: Callable[..., Path], open_engine: Open, random_selection: Draw
) -> None:
    folder = checkpoint(family)
    engine = open_engine(folder)
    rng = random.Random(6)
    selections: list[Selection | None] = [random_selection(engine, rng) for _ in range(3)]
    selections += [None, selections[0]]
    ids, mask = _batch(5, 13, seed=2)
    together = engine.forward(ids, mask, selections)
    for row, selection in enumerate(selections):
        start = int((mask[row] == 0).sum())
        alone = engine.forward(ids[row : row + 1, start:], mask[row : row + 1, start:], [selection])
        torch.testing.assert_close(together[row, start:], alone[0], atol=1e-4, rtol=1e-4)


def test_leftovers_of_other_leases_never_change_an_answer(
    family: str, checkpoint: Callable[..., Path], open_engine: Open, random_selection: Draw
) -> None:
    folder = checkpoint(family)
    fresh, used = open_engine(folder), open_engine(folder)
    rng = random.Random(7)
    selection, other = random_selection(fresh, rng), random_selection(fresh, rng)
    ids, mask = _batch(2, 11, seed=3)
    used.forward(ids, mask, [other, None])
    with used.lease(other):
        assert torch.equal(used.forward(ids, mask, [selection] * 2), fresh.forward(ids, mask, [selection] * 2))
        assert torch.equal(used.forward(ids, mask, [None] * 2), fresh.forward(ids, mask, [None] * 2))


def test_right_padding_is_as_good_as_left_padding(
    family: str, checkpoint: Callable[..., Path], open_engine: Open
) -> None:
    engine = open_engine(checkpoint(family))
    ids = torch.randint(0, 256, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(13) < 9).long().unsqueeze(0)
    alone = engine.forward(ids, torch.ones_like(ids), [None])
    torch.testing.assert_close(engine.forward(padded, mask, [None])[:, :9], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family_in_bf16", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_bfloat16_is_the_plain_model_too(
    family_in_bf16: str, checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    """In bfloat16 sums round differently in another order, so the distance is measured against the float32 truth."""
    folder = checkpoint(family_in_bf16, dtype="bfloat16", std=0.1)
    engine, wide = open_engine(folder), open_engine(folder, dtype="float32")
    assert (engine.plan.dtype, wide.plan.dtype) == ("bfloat16", "float32")
    assert wide.plan.slot_bytes > engine.plan.slot_bytes
    ids, mask = _batch(2, 15, seed=4)
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    truth = wide.forward(ids, mask, [whole] * 2)[mask.bool()]
    ours = engine.forward(ids, mask, [whole] * 2)[mask.bool()]
    theirs = _plain_logits(plain_model(folder), ids, mask)[mask.bool()]
    same_route = (ours - theirs).abs().amax(-1) < 0.05  # a near tie may route a token elsewhere
    assert same_route.float().mean() > 0.9
    assert (ours - truth).abs().median() <= 1.5 * (theirs - truth).abs().median() + 1e-3


def test_float32_over_a_bfloat16_checkpoint_is_the_plain_model_in_float32(
    checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint("qwen2_moe", dtype="bfloat16")
    engine = open_engine(folder, dtype="float32")
    ids, mask = _batch(2, 15, seed=5)
    wanted = _plain_logits(plain_model(folder).float(), ids, mask)
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    torch.testing.assert_close(
        engine.forward(ids, mask, [whole, None])[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4
    )


def test_tied_embeddings_share_their_memory(
    checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    folder = checkpoint("qwen3_moe", tie_word_embeddings=True)
    engine = open_engine(folder)
    ids, mask = _batch(1, 8, seed=6)
    torch.testing.assert_close(
        engine.forward(ids, mask, [None])[mask.bool()],
        _plain_logits(plain_model(folder), ids, mask)[mask.bool()],
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize("renormalise", [True, False])
def test_a_router_that_renormalises_or_not_is_sliced_as_it_is(
    renormalise: bool, checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain, random_selection: Draw
) -> None:
    folder = checkpoint("qwen2_moe", norm_topk_prob=renormalise)
    engine = open_engine(folder)
    selection = random_selection(engine, random.Random(8))
    ids, mask = _batch(2, 12, seed=7)
    wanted = _plain_logits(_slice(plain_model(folder), selection), ids, mask)
    got = engine.forward(ids, mask, [selection] * 2)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


def test_without_groups_the_correction_bias_is_sliced_with_the_router(
    checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain, random_selection: Draw
) -> None:
    folder = checkpoint("deepseek_v3", n_group=1, topk_group=1)
    engine = open_engine(folder)
    selection = random_selection(engine, random.Random(9))
    ids, mask = _batch(2, 12, seed=8)
    wanted = _plain_logits(_restricted(plain_model(folder), "deepseek_v3", selection), ids, mask)
    got = engine.forward(ids, mask, [selection] * 2)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)


def test_a_group_limited_gate_widens_its_groups_when_they_hold_too_few_allowed_experts(
    checkpoint: Callable[..., Path], open_engine: Open, plain_model: Plain
) -> None:
    """Four groups of two, two chosen, top-3, and one allowed expert in each of three groups: all three must be used."""
    folder = checkpoint("deepseek_v3", num_experts_per_tok=3)
    engine = open_engine(folder)
    selection = Selection.of([[0, 3, 5]] * engine.card.layers)
    ids, mask = _batch(2, 12, seed=9)
    wanted = _plain_logits(_restricted(plain_model(folder), "deepseek_v3", selection), ids, mask)
    got = engine.forward(ids, mask, [selection] * 2)
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
