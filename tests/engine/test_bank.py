"""Leases on the bank: what is read and when, whose bytes land where, what a failed read leaves behind."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import reader as reader_module
from engine.engine import Engine
from engine.plan import plan_memory
from engine.products import Products
from engine.residency import ABSENT
from store.errors import BudgetError, CheckpointError
from store.records import ExpertKey, Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


def _stock_experts(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "num_experts")]


def _half(engine: Engine, start: int = 0) -> Selection:
    return Selection.of([range(start, engine.card.experts, 2)] * engine.card.layers)


def _budget(folder: Path, engine: Engine, slots: int) -> dict[str, int]:
    from engine.config import EngineConfig

    plan = plan_memory(engine.card, EngineConfig(folder, memory=2**40, chunk_tokens=64))
    return {"memory": plan.fixed_bytes + slots * plan.slot_bytes, "chunk_tokens": 64}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_expert_lands_as_transformers_would_have_it(
    family: str, dtype: str, checkpoint: Checkpoint, open_engine: Open, plain_model: Callable[[Path], Any]
) -> None:
    """Bytes go straight from the file into their slot, or by way of a buffer, where they are cast."""
    folder = checkpoint(family, max_shard_size="15KB")
    engine = open_engine(folder, dtype=dtype)
    wanted = _stock_experts(plain_model(folder))
    with engine.lease(Selection.whole(engine.card.layers, engine.card.experts)):
        for layer, row in enumerate(engine.bank.residency.table):
            for expert, slot in enumerate(row):
                for parameter, view in zip(engine.bank.layout.parameters, engine.bank.weights(slot), strict=True):
                    plain = getattr(wanted[layer], parameter.name)[expert]
                    assert torch.equal(view, plain.to(view.dtype)), (layer, expert)


def test_a_lease_reads_what_is_missing_and_nothing_else(checkpoint: Checkpoint, open_engine: Open) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    half = _half(engine)
    with engine.lease(half) as first:
        assert (first.experts, first.experts_paged) == (12, 12)
        assert first.bytes_paged == 12 * engine.card.expert_bytes
        with engine.lease(Selection.of([[0, 1, 2, 4]] * 3)) as second:
            assert (second.experts, second.experts_paged, second.bytes_paged) == (12, 3, 3 * engine.card.expert_bytes)
            assert engine.residency().leased == 15  # shared experts are there once
    with engine.lease(half) as again:
        assert again.experts_paged == 0
    assert engine.residency().resident == 15


def test_what_is_served_from_the_bank_is_what_is_in_the_file(checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("mixtral")
    engine = open_engine(folder)
    tensors = load_file(folder / "model.safetensors")
    key = ExpertKey(2, 5)
    with engine.lease(Selection.of([[0, 1], [0, 1], [3, 5]])):
        gate_up, down = engine.bank.weights(engine.bank.residency.slot(key))
    prefix = "model.layers.2.block_sparse_moe.experts.5"
    assert torch.equal(gate_up[:16], tensors[f"{prefix}.w1.weight"])
    assert torch.equal(gate_up[16:], tensors[f"{prefix}.w3.weight"])
    assert torch.equal(down, tensors[f"{prefix}.w2.weight"])


def test_a_failed_read_leaves_the_slot_empty_and_the_old_lease_serving(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    ids, mask = torch.randint(0, 256, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    kept, wanted = _half(engine), Selection.of([[0, 1, 2]] * 3)
    with engine.lease(kept):
        before = engine.forward(ids, mask, [kept])
        monkeypatch.setattr(reader_module.os, "preadv", _fail)
        with pytest.raises(CheckpointError, match="Input/output error"), engine.lease(wanted):
            pytest.fail("a lease whose read failed must not begin")
        monkeypatch.undo()
        engine.bank.residency.check()
        assert all(engine.bank.residency.slot(ExpertKey(layer, 1)) == ABSENT for layer in range(3))
        assert engine.residency().leased == len(kept)
        assert torch.equal(engine.forward(ids, mask, [kept]), before)
    with engine.lease(wanted) as later:
        assert later.experts_paged == 3


def _fail(*_: object) -> int:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_failed_read_in_exact_mode_pins_nothing(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    ids, mask = torch.randint(0, 256, (1, 9)), torch.ones(1, 9, dtype=torch.long)
    monkeypatch.setattr(reader_module.os, "preadv", _fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        engine.forward(ids, mask, [None])
    assert engine.residency().resident == 0
    engine.bank.residency.check()
    monkeypatch.undo()
    assert engine.forward(ids, mask, [None]).isfinite().all()


@pytest.mark.parametrize("kernel", ["torch", "own"])
def test_an_expert_that_fails_to_compute_leaves_no_pin(
    kernel: str, checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"), kernel=kernel)
    ids, mask = torch.randint(0, 256, (2, 9)), torch.ones(2, 9, dtype=torch.long)

    def explode(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(engine.layers._experts[1], "_feed_forward", explode)
    monkeypatch.setattr(Products, "many", explode)
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        engine.forward(ids, mask, [None, None])
    assert caught.value.__traceback__ is not None  # even while the traceback keeps the frames alive
    assert engine.residency().leased == 0
    assert engine.board.routing is None


def test_exact_mode_pages_through_a_single_free_slot(checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("qwen2_moe")
    roomy = open_engine(folder)
    selection = Selection.of([[0, 1, 2], [1, 2], [3, 4]])
    tight = open_engine(folder, **_budget(folder, roomy, slots=len(selection) + 1))
    ids, mask = torch.randint(0, 256, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    with tight.lease(selection):
        assert tight.bank.residency.available == 1
        assert torch.equal(tight.forward(ids, mask, [None, None]), roomy.forward(ids, mask, [None, None]))
        assert tight.residency().leased == len(selection)


def test_exact_mode_without_a_free_slot_is_refused(checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("qwen2_moe")
    engine = open_engine(folder, **_budget(folder, open_engine(folder), slots=12))
    ids, mask = torch.randint(0, 256, (1, 5)), torch.ones(1, 5, dtype=torch.long)
    with engine.lease(_half(engine)), pytest.raises(BudgetError, match="leases hold all 12"):
        engine.forward(ids, mask, [None])


def test_two_leases_that_do_not_fit_together_leave_the_first_alone(checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("qwen2_moe")
    engine = open_engine(folder, **_budget(folder, open_engine(folder), slots=14))
    with engine.lease(_half(engine)):
        with pytest.raises(BudgetError, match="12 need a slot"), engine.lease(_half(engine, 1)):
            pytest.fail("there is no room for this lease")
        assert engine.residency().leased == 12
        assert engine.residency().experts_paged == 12


def test_many_random_leases_and_batches_stay_sound_under_a_tight_budget(
    checkpoint: Checkpoint, open_engine: Open, random_selection: Callable[[Engine, random.Random], Selection]
) -> None:
    folder = checkpoint("olmoe")
    roomy = open_engine(folder)
    tight = open_engine(folder, **_budget(folder, roomy, slots=20))
    rng = random.Random(3)
    for step in range(25):
        selection = random_selection(tight, rng)
        ids = torch.randint(0, 256, (1, rng.randint(1, 12)), generator=torch.Generator().manual_seed(step))
        row = None if rng.random() < 0.3 or len(selection) > 20 else selection
        mask = torch.ones_like(ids)
        assert torch.equal(tight.forward(ids, mask, [row]), roomy.forward(ids, mask, [row]))
        tight.bank.residency.check()
