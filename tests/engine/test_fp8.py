"""FP8 checkpoints: their values against a loop in plain Python, and whole models against transformers with those."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.config import EngineConfig
from engine.conversion import needs_scratch
from engine.engine import Engine
from engine.fp8 import Scratch, dequantise, quantise
from engine.plan import READER_THREADS, plan_memory, reader_bytes
from engine.ring import Ring
from engine.tiny import write_tiny
from engine.tiny_quantised import write_fp8
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, UnsupportedFamily
from store.experts import ExpertMap
from store.quantised import INVERSE
from store.records import ExpertKey, Selection

Open = Callable[..., Engine]
BLOCK = (8, 5)  # nothing below is a multiple of it
FIELDS: dict[str, Any] = {"hidden_size": 36, "moe_intermediate_size": 19, "intermediate_size": 23}


def _slowly(stored: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """One value at a time."""
    values = stored.float()
    out = torch.empty_like(values)
    for i in range(values.shape[0]):
        for j in range(values.shape[1]):
            out[i, j] = values[i, j].item() * scales[i // block[0], j // block[1]].item()
    return out


@pytest.mark.parametrize("shape", [(1, 1), (7, 4), (8, 5), (9, 6), (130, 257)])
@pytest.mark.parametrize("block", [(8, 5), (128, 128), (1, 3)])
def test_values_are_multiplied_by_the_scale_of_their_block(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight = torch.randn(shape) * torch.rand(shape).exp()
    stored, scales = quantise(weight, block)
    wide = torch.empty(shape)
    dequantise(stored, scales, block, wide)
    torch.testing.assert_close(wide, _slowly(stored, scales, block), rtol=1e-6, atol=0)
    assert (wide - weight).abs().max() <= weight.abs().max() / 16  # three bits of mantissa
    narrow = torch.empty(shape, dtype=torch.bfloat16)
    dequantise(stored, scales, block, narrow)
    assert narrow.equal(wide.bfloat16())  # rounded once
    both = torch.empty(2, *shape)
    dequantise(torch.stack([stored, stored]), torch.stack([scales, 2 * scales]), block, both)
    assert both[0].equal(wide)
    assert both[1].equal(2 * wide)
    roomy, again = Scratch([(200, 300), shape], torch.device("cpu")), torch.empty(shape)
    for _ in range(2):
        dequantise(stored, scales, block, again, roomy)
        assert again.equal(wide)


def test_every_byte_means_what_torch_says() -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16)
    target = torch.empty(16, 16)
    dequantise(stored, torch.ones(1, 1), (16, 16), target)
    torch.testing.assert_close(target, stored.float(), rtol=0, atol=0, equal_nan=True)
    assert target.isnan().sum() == 2


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """An FP8 checkpoint, and one of the values that it means, made one at a time."""

    def make(family: str, **fields: Any) -> tuple[Path, Path]:
        quantised = write_fp8(write_tiny(family, tmp_path / "fp8", dtype="float32", **fields), BLOCK)
        meant = write_tiny(family, tmp_path / "wide", dtype="float32", **fields)
        held = load_file(quantised / "model.safetensors")
        scales = {name for name in held if name + INVERSE in held}
        wide = {name: _slowly(tensor, held[name + INVERSE], BLOCK) if name in scales else tensor
                for name, tensor in held.items() if not name.endswith("_scale_inv")}  # fmt: skip
        save_file(wide, meant / "model.safetensors", metadata={"format": "pt"})
        return quantised, meant

    return make


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_a_whole_model_is_transformers_with_the_dequantised_weights(
    family: str, pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair(family, **FIELDS)
    names = load_file(quantised / "model.safetensors")
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in names.values()) > 50
    engine = open_engine(quantised, dtype="float32")
    ids = torch.randint(0, 256, (2, 12))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(meant, experts_implementation="eager").eval()
        wanted = plain(input_ids=ids).logits
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    torch.testing.assert_close(engine.forward(ids, mask, [whole, None]), wanted, atol=1e-4, rtol=1e-4)
    rng = random.Random(1)
    part = Selection.of([rng.sample(range(8), 5) for _ in range(engine.card.layers)])
    same = open_engine(meant).forward(ids, mask, [part, part])
    torch.testing.assert_close(engine.forward(ids, mask, [part, part]), same, atol=1e-4, rtol=1e-4)


def test_the_smallest_budget_pages_bytes_as_stored_and_counts_slots_so_too(
    pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair("qwen3_moe", **FIELDS)
    wide = open_engine(meant)
    roomy = EngineConfig(quantised, memory=2**40, dtype="float32")
    floor = plan_memory(open_engine(quantised, dtype="float32").card, roomy).floor_bytes
    engine = open_engine(quantised, memory=floor, dtype="float32")
    assert engine.plan.slots == engine.card.layers * engine.card.top_k
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        engine.forward(ids, mask, [None, None]), wide.forward(ids, mask, [None, None]), atol=1e-4, rtol=1e-4
    )
    held = load_file(quantised / "model.safetensors")
    expert = [tensor for name, tensor in held.items() if ".layers.0.mlp.experts.0." in name]
    assert engine.card.expert_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expert)
    assert engine.bank.paged.bytes_needed == engine.bank.paged.experts * engine.card.expert_bytes
    assert engine.plan.dense_bytes == wide.plan.dense_bytes
    assert engine.plan.slots_in == "fp8"
    assert engine.bank.slot_bytes <= engine.plan.slot_bytes < 0.4 * wide.plan.slot_bytes  # float32: a quarter and more
    assert engine.bank.layout.direct


def test_with_torchs_products_experts_become_the_serving_dtype_on_their_way(
    pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair("qwen3_moe", **FIELDS)
    wide = open_engine(meant, kernel="torch")
    engine = open_engine(quantised, dtype="float32", kernel="torch")
    assert engine.plan.slots_in == "float32"
    assert engine.plan.slot_bytes == wide.plan.slot_bytes
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        engine.forward(ids, mask, [None, None]), wide.forward(ids, mask, [None, None]), atol=1e-4, rtol=1e-4
    )
    way = engine.bank.arrivals.way
    assert isinstance(way, Ring)
    planned = engine.plan.staging_bytes - READER_THREADS * reader_bytes(engine.card)
    scratch = engine.card.geometry.scratch if needs_scratch(torch.float32, on_host=True) else 0
    planned -= engine.card.geometry.scratch - scratch
    assert 0 <= planned - way.staging.nbytes < 200  # a weight's scales, which may need a copy in float32


def test_without_a_named_dtype_fp8_is_served_in_bfloat16(tmp_path: Path, open_engine: Open) -> None:
    folder = write_fp8(write_tiny("qwen3_moe", tmp_path / "m"), BLOCK)
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert open_engine(folder).plan.dtype == "bfloat16"


def test_experts_alone_may_be_fp8(tmp_path: Path, open_engine: Open) -> None:
    folder = write_fp8(write_tiny("qwen3_moe", tmp_path / "m"), BLOCK, lambda name: ".experts." in name)
    engine = open_engine(folder)
    assert engine.forward(torch.arange(6).view(1, 6), torch.ones(1, 6, dtype=torch.long), [None]).isfinite().all()


def test_layers_may_differ_in_how_their_experts_are_stored(tmp_path: Path, open_engine: Open) -> None:
    folder = write_fp8(write_tiny("qwen3_moe", tmp_path / "m"), BLOCK, lambda name: ".layers.1.mlp.experts." in name)
    engine = open_engine(folder)
    assert not engine.plan.quantised
    assert engine.plan.staging_bytes > open_engine(write_tiny("qwen3_moe", tmp_path / "n")).plan.staging_bytes
    experts = ExpertMap.build(CheckpointMap.open(folder))
    assert [len(experts.span(ExpertKey(layer, 0)).parts) for layer in range(3)] == [3, 6, 3]
    assert engine.forward(torch.arange(6).view(1, 6), torch.ones(1, 6, dtype=torch.long), [None]).isfinite().all()


@pytest.mark.parametrize("family", ["qwen3_moe"])
def test_a_lost_scale_and_a_foreign_form_are_refused_before_any_weight_is_read(
    family: str, tmp_path: Path, open_engine: Open
) -> None:
    folder = write_fp8(write_tiny(family, tmp_path / "m"), BLOCK)
    held = load_file(folder / "model.safetensors")
    lost = held.pop("model.layers.1.mlp.experts.3.up_proj.weight_scale_inv")
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj\.weight is FP8, and its scales .* are missing"):
        open_engine(folder)
    held["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"] = lost.T.contiguous()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="belong to different models"):
        open_engine(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "awq"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFamily, match="quantised by awq"):
        open_engine(folder)


@pytest.mark.parametrize("kernel", ["own", "torch"])
def test_a_scale_for_each_row_as_compressed_tensors_stores_them(kernel: str, tmp_path: Path, open_engine: Open) -> None:
    quantised, meant = (write_tiny("qwen3_moe", tmp_path / name, dtype="float32", **FIELDS) for name in ("q", "w"))
    held, wide = load_file(quantised / "model.safetensors"), {}
    for name, tensor in dict(held).items():
        wide[name] = tensor
        if name.endswith("_proj.weight"):
            held[name], scales = quantise(tensor, (1, tensor.shape[1]))
            held[f"{name}_scale"] = scales.bfloat16()
            wide[name] = held[name].float() * scales.bfloat16().float()
    save_file(held, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(wide, meant / "model.safetensors", metadata={"format": "pt"})
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}, "input_activations": {"dynamic": True}}
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}
    }  # fmt: skip
    (quantised / "config.json").write_text(json.dumps(config))
    ids = torch.randint(0, 256, (2, 9))
    found, wanted = (
        open_engine(folder, dtype="float32", kernel=kernel).forward(ids, torch.ones_like(ids), [None, None])
        for folder in (quantised, meant)
    )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
