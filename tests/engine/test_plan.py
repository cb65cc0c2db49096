"""The memory plan: sums that add up, floors that work, refusals that name the fix; and the plan against the truth."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import MIB, plan_memory
from store.errors import BudgetError, InvalidInput
from store.records import Selection

Checkpoint = Callable[..., Path]


def test_the_card_says_what_the_folder_holds(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("qwen2_moe"))
    assert (card.family, card.layers, card.experts, card.top_k) == ("qwen2_moe", 3, 8, 2)
    assert (card.hidden, card.vocab, card.max_context) == (32, 260, 512)
    assert card.expert_bytes == 3 * 16 * 32 * 4
    assert ModelCard.read(checkpoint("deepseek_v3")).layers == 2


def test_without_a_budget_every_expert_has_a_slot(family: str, checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint(family))
    plan = plan_memory(card, EngineConfig(card.folder))
    assert plan.slots == card.layers * card.experts
    assert plan.keep == 1
    assert plan.fits(Selection.whole(card.layers, card.experts))
    assert plan.total_bytes == plan.fixed_bytes + plan.slots * plan.slot_bytes


def test_the_plan_counts_what_the_engine_really_allocates(
    family: str, checkpoint: Checkpoint, open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint(family), max_context=64, max_batch=3)
    plan, model = engine.plan, engine.passes._model
    dense = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    persistent = {id(tensor): tensor.nbytes for tensor in model.state_dict(keep_vars=True).values()}
    assert plan.dense_bytes == sum(persistent.values())
    assert sum(dense.values()) - sum(persistent.values()) < 4096  # rotary frequencies
    assert plan.kv_bytes + plan.state_bytes == engine.kv.nbytes
    assert plan.slots * plan.slot_bytes == engine.bank.memory.nbytes


def test_a_budget_is_filled_with_slots_and_never_exceeded(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("olmoe"))
    full = plan_memory(card, EngineConfig(card.folder, chunk_tokens=64))
    for budget in range(full.floor_bytes, full.total_bytes + 50_000, 7919):
        plan = plan_memory(card, EngineConfig(card.folder, memory=budget, chunk_tokens=64))
        assert plan.total_bytes <= budget
        assert plan.slots == full.slots or plan.total_bytes + plan.slot_bytes > budget


def test_the_budget_that_a_refusal_names_works_and_one_mebibyte_less_does_not(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("mixtral"))
    with pytest.raises(BudgetError) as refusal:
        plan_memory(card, EngineConfig(card.folder, memory=1000))
    match = re.search(r"Give --memory (\d+)MiB or more", str(refusal.value))
    assert match is not None
    smallest = int(match[1])
    plan = plan_memory(card, EngineConfig(card.folder, memory=smallest * MIB))
    assert plan.slots >= card.layers * card.top_k
    with pytest.raises(BudgetError):
        plan_memory(card, EngineConfig(card.folder, memory=(smallest - 1) * MIB))


def test_a_refusal_names_every_number(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("mixtral"))
    with pytest.raises(
        BudgetError, match=r"dense weights, .* KV cache \(8 rows x 512 tokens\).* workspace .* 3 x 2 slots"
    ):
        plan_memory(card, EngineConfig(card.folder, memory=1))


def test_a_selection_that_does_not_fit_is_refused_with_the_budget_that_holds_it(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("mixtral"))
    roomy = plan_memory(card, EngineConfig(card.folder, chunk_tokens=64))
    plan = plan_memory(card, EngineConfig(card.folder, memory=roomy.memory_for(0.5), chunk_tokens=64))
    half = Selection.of([range(4)] * card.layers)
    plan.require(half)
    with pytest.raises(BudgetError, match=r"24 experts, .* 12 slots .* at most 4 of 8 experts a layer \(50%\)"):
        plan.require(Selection.whole(card.layers, card.experts))


def test_slots_are_global_so_layers_may_keep_different_numbers(
    checkpoint: Checkpoint, open_engine: Callable[..., Engine]
) -> None:
    folder = checkpoint("mixtral")
    card = ModelCard.read(folder)
    memory = plan_memory(card, EngineConfig(folder, chunk_tokens=64)).memory_for(0.5)
    engine = open_engine(folder, memory=memory, chunk_tokens=64)
    uneven = Selection.of([range(8), range(2), range(2)])
    with engine.lease(uneven) as lease:
        assert lease.experts == engine.plan.slots == 12
    assert engine.residency().per_layer == (8, 2, 2)


def test_the_dtype_that_is_served_sets_the_bytes(checkpoint: Checkpoint) -> None:
    card = ModelCard.read(checkpoint("qwen2_moe", dtype="bfloat16"))
    own = plan_memory(card, EngineConfig(card.folder))
    wide = plan_memory(card, EngineConfig(card.folder, dtype="float32"))
    assert own.dtype == "bfloat16"
    assert (wide.dense_bytes, wide.slot_bytes) == (2 * own.dense_bytes, 2 * own.slot_bytes)
    assert wide.staging_bytes > own.staging_bytes


def test_experts_stored_in_another_dtype_than_the_config_names_are_staged_and_counted(
    checkpoint: Checkpoint, open_engine: Callable[..., Engine], tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint("olmoe"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    engine = open_engine(folder)
    assert (engine.plan.dtype, engine.card.geometry.stored) == ("bfloat16", "float32")
    assert engine.plan.staging_bytes >= engine.card.expert_bytes + 2 * 256 * 1024
    ids = torch.randint(0, 256, (1, 6))
    assert engine.forward(ids, torch.ones_like(ids), [None]).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"memory": 0}, "memory"),
        ({"max_batch": 0}, "max_batch"),
        ({"dtype": "int8"}, "dtype"),
        ({"threads": -1}, "threads"),
    ],
)
def test_a_setting_out_of_range_is_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidInput) as refusal:
        EngineConfig(Path("model"), **fields)  # type: ignore[arg-type]
    assert refusal.value.param == param


def test_planning_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, engine.plan, engine.card; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_request_longer_than_the_context_is_refused(
    checkpoint: Checkpoint, open_engine: Callable[..., Engine], ask: Callable[..., object]
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"), max_context=32)
    engine.admission.check(ask((1,) * 24, max_tokens=8))  # type: ignore[arg-type]
    with pytest.raises(
        InvalidInput, match="24 tokens and max_tokens is 9, together 33; the context holds 32"
    ) as refusal:
        engine.admission.check(ask((1,) * 24, max_tokens=9))  # type: ignore[arg-type]
    assert refusal.value.code == "context_length_exceeded"


def test_the_kv_formula_covers_what_transformers_caches(
    family: str, checkpoint: Checkpoint, open_engine: Callable[..., Engine]
) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    folder = checkpoint(family)
    engine = open_engine(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.zeros(1, 10, dtype=torch.long), past_key_values=cache)
    grown = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert engine.card.geometry.kv_per_token * 10 * 4 == sum(one.keys.nbytes + one.values.nbytes for one in grown)
    running = [layer for layer in cache.layers if layer not in grown]
    states = [*(one.conv_states[0] for one in running), *(one.recurrent_states[0] for one in running)]
    assert engine.plan.state_bytes == 2 * engine.plan.max_batch * sum(state.nbytes for state in states)


@pytest.mark.parametrize("kind", ["kimi_linear", "granitemoehybrid", "lfm2_moe", "glm_moe_dsa", "nemotron_h", "jamba"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_layers_of_other_kinds_keep_is_planned_as_it_is_allocated(
    kind: str, dtype: str, checkpoint: Checkpoint, open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint(kind), dtype=dtype, max_batch=3, max_context=40)
    assert engine.plan.kv_bytes + engine.plan.state_bytes == engine.kv.nbytes
    assert bool(engine.plan.state_bytes) == (kind != "glm_moe_dsa")
