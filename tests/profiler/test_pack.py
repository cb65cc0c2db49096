"""Packs against plain transformers with the same weights cut by hand, and what must not go wrong on the disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import FAMILIES, write_tiny
from profiler import pack, pack_folder
from profiler.pack import write_pack
from profiler.pack_recipes import FewerChannels
from store.errors import BudgetError, CheckpointError, Conflict, InvalidInput, ShardChanged, UnsupportedFamily
from store.records import Selection

IDS = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def _nothing(folder: Path) -> dict[str, Any]:
    return {}


def _recipe(engine: Engine, width: int, selection: Selection | None = None, seed: int = 0) -> FewerChannels:
    card = engine.card
    scores = np.random.default_rng(seed).random((card.layers, card.experts, engine.layers.channels.width))
    return FewerChannels(scores, width, selection or Selection.whole(card.layers, card.experts))


def _plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def _modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "is_transposed")]


def _zeroed(model: Any, recipe: FewerChannels) -> Any:
    """The same model whose lost channels do nothing: their columns of the down projection are zero."""
    for layer, module in enumerate(_modules(model)):
        for expert in range(module.num_experts):
            lost = torch.ones(recipe.scores.shape[-1], dtype=torch.bool)
            lost[recipe.chosen(layer, expert)] = False
            down = module.down_proj.data[expert]
            (down if module.is_transposed else down.T)[lost] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pack_of_fewer_channels_is_the_model_without_the_others_in_both_engines(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "model", seed=3)
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        recipe = _recipe(engine, 8)
        card = write_pack(engine, recipe, tmp_path / "pack", _nothing)
    wanted = _logits(_zeroed(_plain(folder), recipe))
    packed = _plain(tmp_path / "pack")
    assert all(module.down_proj.numel() * 2 == before.down_proj.numel() or family == "gpt_oss"
               for module, before in zip(_modules(packed), _modules(_plain(folder)), strict=True))  # fmt: skip
    torch.testing.assert_close(_logits(packed), wanted, atol=1e-4, rtol=1e-4)
    with Engine.open(EngineConfig(tmp_path / "pack", max_context=64)) as engine:
        ours = engine.forward(IDS, torch.ones_like(IDS), [None, None])
        assert engine.layers.channels.width == 8
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    assert card == json.loads((tmp_path / "pack" / "pack.json").read_text())
    assert card["channels"] == [16, 8]
    assert card["expert_bytes"][1] * 2 == pytest.approx(card["expert_bytes"][0], rel=0.05)


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "gpt_oss", "olmoe"])
def test_a_pack_of_fewer_experts_is_the_selection(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "model", seed=4)
    selection = Selection.of([[1, 2, 5, 7], [0, 3, 4, 6], [0, 1, 2, 3]])
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        wanted = engine.forward(IDS, torch.ones_like(IDS), [selection] * 2)
        write_pack(engine, _recipe(engine, engine.layers.channels.width, selection), tmp_path / "pack", _nothing)
    torch.testing.assert_close(_logits(_plain(tmp_path / "pack")), wanted, atol=1e-4, rtol=1e-4)


def test_a_router_that_chooses_groups_keeps_all_experts(tmp_path: Path) -> None:
    folder = write_tiny("deepseek_v3", tmp_path / "model")
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        recipe = _recipe(engine, 16, Selection.of([range(4)] * engine.card.layers))
        with pytest.raises(UnsupportedFamily, match="groups"):
            write_pack(engine, recipe, tmp_path / "pack", _nothing)


def test_what_a_constant_channel_gives_goes_into_the_bias_exactly(tmp_path: Path) -> None:
    """With gate and up at zero, what is left of their channels are biases: constant."""
    folder = write_tiny("gpt_oss", tmp_path / "model", seed=6)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if name.endswith("gate_up_proj"):
            tensor[:, :, :16] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        card, channels = engine.card, engine.layers.channels
        scores = np.ones((card.layers, card.experts, channels.width))
        scores[:, :, :8] = 0
        means = np.zeros_like(scores)
        for layer, module in enumerate(_modules(_plain(folder))):
            h = module._apply_gate(module.gate_up_proj_bias.detach())  # [E, F]
            means[layer, :, :8] = h[:, :8].numpy()
        whole = Selection.whole(card.layers, card.experts)
        write_pack(engine, FewerChannels(scores, 8, whole, means), tmp_path / "pack", _nothing)
    torch.testing.assert_close(_logits(_plain(tmp_path / "pack")), _logits(_plain(folder)), atol=1e-4, rtol=1e-4)


def test_compensation_needs_a_bias_to_go_into(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "model")
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        base = _recipe(engine, 8)
        with pytest.raises(InvalidInput, match="no bias"):
            write_pack(engine, FewerChannels(base.scores, 8, base.selection, base.scores), tmp_path / "p", _nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_nothing_is_overwritten_and_nothing_is_left_of_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "model")
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        recipe = _recipe(engine, 8)
        with pytest.raises(Conflict, match="exists"):
            write_pack(engine, recipe, folder, _nothing)

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(pack_folder.os, "fsync", full)
            with pytest.raises(BudgetError, match="No space left"):
                write_pack(engine, recipe, tmp_path / "pack", _nothing)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

        def fails(made: Path) -> dict[str, Any]:
            assert (made / "config.json").exists()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_pack(engine, recipe, tmp_path / "pack", fails)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_model_that_changes_while_it_is_packed_leaves_no_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiny("qwen2_moe", tmp_path / "model") / "model.safetensors"
    os.utime(file, ns=(0, 5 * 10**9))  # long ago: every write from now on has another time
    real = pack.dense_tensors

    def overwritten(*args: Any) -> Any:
        weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
        return real(*args)

    monkeypatch.setattr(pack, "dense_tensors", overwritten)
    with (
        Engine.open(EngineConfig(file.parent, max_context=64)) as engine,
        pytest.raises(ShardChanged, match="its time of writing was 1970"),
    ):
        write_pack(engine, _recipe(engine, 8), tmp_path / "pack", _nothing)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("width", [0, 5, 24])
def test_a_width_out_of_range_is_refused(width: int, tmp_path: Path) -> None:
    with (
        Engine.open(EngineConfig(write_tiny("qwen2_moe", tmp_path / "model"), max_context=64)) as engine,
        pytest.raises(InvalidInput, match="multiple of 8"),
    ):
        _recipe(engine, width)


def test_layers_with_other_numbers_of_experts_and_too_few_of_them_are_refused(tmp_path: Path) -> None:
    with Engine.open(EngineConfig(write_tiny("qwen2_moe", tmp_path / "model"), max_context=64)) as engine:
        with pytest.raises(InvalidInput, match="same number"):
            _recipe(engine, 8, Selection.of([[0, 1], [0, 1, 2], [0, 1]]))
        with pytest.raises(InvalidInput, match="between 2"):
            write_pack(engine, _recipe(engine, 8, Selection.of([[0]] * 3)), tmp_path / "pack", _nothing)


def test_nan_in_the_checkpoint_and_another_type_than_its_own_are_refused(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "model", dtype="bfloat16")
    with (
        Engine.open(EngineConfig(folder, max_context=64, dtype="float32")) as engine,
        pytest.raises(UnsupportedFamily, match="dtype auto"),
    ):
        write_pack(engine, _recipe(engine, 8), tmp_path / "pack", _nothing)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.experts.2.down_proj.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        Engine.open(EngineConfig(folder, max_context=64)) as engine,
        pytest.raises(CheckpointError, match="Expert 2 of MoE layer 1"),
    ):
        write_pack(engine, _recipe(engine, 8), tmp_path / "pack", _nothing)
    assert not (tmp_path / "pack").exists()
