"""What decoder layers keep of a row is seen, not read from names, and what a pass works in is counted on shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from engine import tried
from engine.cache_shape import CacheShape, StateShape
from engine.card import ModelCard
from engine.engine import Engine
from engine.tried import try_layers
from engine.watermark import Watermark
from store.checkpoint import CheckpointMap
from store.errors import UnsupportedFamily
from store.experts import ExpertMap

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
BF16, F32 = torch.bfloat16, torch.float32


def test_columns_running_states_and_indexers_are_seen(checkpoint: Checkpoint) -> None:
    delta = CacheShape(states=(StateShape("conv", 0, (64, 4), BF16), StateShape("recurrent", 0, (4, 8, 8), F32)))
    assert try_layers(checkpoint("qwen3_next"), "bfloat16").caches == (delta, CacheShape(((2, 8), (2, 8))), delta)
    conv = CacheShape(states=(StateShape("conv", 0, (32, 3), BF16),))
    assert try_layers(checkpoint("lfm2_moe"), "bfloat16").caches[0] == conv
    indexed = try_layers(checkpoint("deepseek_v32"), "bfloat16")
    assert all(shape.index == 8 and shape.kv is not None and not shape.states for shape in indexed.caches)
    assert (indexed.theirs, indexed.ours, indexed.modules) == ((0, 0), (0, 0), 0)


def test_layers_without_attention_of_any_kind_keep_nothing(checkpoint: Checkpoint) -> None:
    assert [shape.remembers for shape in try_layers(checkpoint("nemotron_h"), "float32").caches] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("kind", "older"),
    [
        ("granitemoehybrid", {"linear_attention": "mamba", "full_attention": "attention"}),
        ("deepseek_v32", {"indexed_attention": "deepseek_sparse_attention"}),
    ],
)
def test_names_of_layers_in_published_configs_are_known(
    kind: str, older: dict[str, str], checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint(kind, seed=3)
    config = json.loads((folder / "config.json").read_text())
    ids = torch.arange(6).unsqueeze(0)
    wanted = open_engine(folder).forward(ids, torch.ones_like(ids), [None])
    config["layer_types"] = [older.get(name, name) for name in config["layer_types"]]
    assert set(config["layer_types"]) & set(older.values())
    (folder / "config.json").write_text(json.dumps(config))
    assert open_engine(folder).forward(ids, torch.ones_like(ids), [None]).equal(wanted)


def test_a_config_that_names_no_kinds_is_found_out_by_its_tensors(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen3_next", seed=4, full_attention_interval=2)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_types") == ["linear_attention", "full_attention", "linear_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    assert ModelCard.read(folder).geometry.states.nbytes == 2 * 4 * 8 * 8 * 4


def test_the_most_memory_that_is_held_at_once_is_counted() -> None:
    with Watermark() as watermark:
        x = torch.zeros(1000, device="meta")  # 4 kB
        y = x + x
        view = y[:10]
        del x, y  # the view holds y
        z = torch.zeros(500, device="meta")
        del view
        w = torch.zeros(1500, device="meta")
    assert watermark.peak == 8000
    assert (len(z), len(w)) == (500, 1500)


def test_what_a_pass_works_in_grows_with_its_tokens_and_has_a_least(checkpoint: Checkpoint) -> None:
    geometry = ModelCard.read(checkpoint("qwen3_next")).geometry
    token, row = geometry.states.working
    assert 64 * 4 < token < 100_000  # its convolution alone takes as much
    assert row > token
    assert ModelCard.read(checkpoint("qwen3_moe")).geometry.states.working == (0, 0)


@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid", "kimi_linear", "nemotron_h", "glm_moe_dsa"])
def test_what_is_counted_besides_experts_is_what_the_checkpoint_has(kind: str, checkpoint: Checkpoint) -> None:
    source = CheckpointMap.open(checkpoint(kind))
    stored = sum(source.tensors[name].nbytes for name in ExpertMap.build(source).dense)
    assert 4 * try_layers(checkpoint(kind), "float32").dense == stored


@pytest.mark.parametrize("kind", ["qwen3_next", "granitemoehybrid", "kimi_linear", "lfm2_moe", "nemotron_h", "jamba"])
def test_by_our_own_products_a_pass_works_in_less_and_as_many_modules_call_them_as_were_counted_on(
    kind: str, checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint(kind)
    own, torchs = open_engine(folder, max_context=64), open_engine(folder, max_context=64, kernel="torch")
    states = own.card.geometry.states
    assert states.modules >= 1
    assert own.plan.workspace_bytes <= torchs.plan.workspace_bytes
    assert (own.plan.workspace_bytes < torchs.plan.workspace_bytes) == (states.working_own != states.working)
    assert f"running states of {states.modules}" in own.kernel


def test_a_model_is_tried_once_for_what_its_config_says(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    real = tried.on_meta
    monkeypatch.setattr(tried, "on_meta", lambda folder, dtype: built.append(folder) or real(folder, dtype))
    folder = checkpoint("qwen3_next", seed=9)
    first, again = ModelCard.read(folder), ModelCard.read(folder)
    assert (first.geometry, built) == (again.geometry, [folder])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"linear_conv_kernel_dim": 3}))
    assert ModelCard.read(folder).geometry.states != first.geometry.states


def test_functions_that_do_something_else_than_ours_are_said_before_anything_is_served(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"):
        monkeypatch.setattr(qwen, f"torch_{name}", _twice(getattr(qwen, f"torch_{name}")))
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        monkeypatch.setattr(qwen, name, _twice(getattr(qwen, name)))
    with pytest.raises(UnsupportedFamily, match="and those of 0 do what our own products do"):
        open_engine(checkpoint("qwen3_next"))


def _twice(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def twice(*args: Any, **named: Any) -> Any:
        found = function(*args, **named)
        return (2 * found[0], found[1]) if isinstance(found, tuple) else 2 * found

    return twice
