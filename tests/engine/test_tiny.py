"""Tiny checkpoints: hub layout, same seed same bytes, sharded on request, a tokenizer that takes any text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(family: str, tmp_path: Path) -> None:
    first, second, third = (
        (write_tiny(family, tmp_path / name, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != third


def test_names_are_the_hubs(tmp_path: Path) -> None:
    names = CheckpointMap.open(write_tiny("mixtral", tmp_path / "m")).tensors
    assert "model.layers.2.block_sparse_moe.experts.7.w3.weight" in names
    names = CheckpointMap.open(write_tiny("deepseek_v3", tmp_path / "d")).tensors
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in names


def test_routing_varies_and_the_correction_bias_is_not_zero(family: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(folder)
    chosen: set[int] = set()
    routers = [m for m in model.modules() if "Router" in type(m).__name__]
    for router in routers:
        router.register_forward_hook(lambda *call: chosen.update(call[2][2].flatten().tolist()))
        if hasattr(router, "e_score_correction_bias"):
            assert router.e_score_correction_bias.abs().min() > 0
    with torch.inference_mode():
        model(torch.arange(64).unsqueeze(0))
    assert len(chosen) >= 6


def test_fields_and_shards_are_as_asked(tmp_path: Path) -> None:
    folder = write_tiny("olmoe", tmp_path / "m", dtype="bfloat16", max_shard_size="20KB", num_experts=4)
    checkpoint = CheckpointMap.open(folder)
    assert len(checkpoint.files) > 2
    assert checkpoint.config["num_experts"] == 4
    assert {span.dtype for span in checkpoint.tensors.values()} == {"BF16"}
    with pytest.raises(ValueError, match="qwen2_moe, qwen3_moe"):
        write_tiny("gpt2", tmp_path / "n")


def test_any_text_survives_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tiny("olmoe", tmp_path / "m"))
    for text in ("plain", "  spaces\n", "naïve 日本 👩‍🚀", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
