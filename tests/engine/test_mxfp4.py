"""MXFP4 checkpoints: their numbers by the format's table, and whole models against transformers with those."""

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
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.config import EngineConfig
from engine.engine import Engine
from engine.mxfp4 import quantise
from engine.plan import plan_memory
from engine.products import Products, instruction_sets
from engine.tiny import write_tiny
from engine.tiny_quantised import write_mxfp4, write_quantised
from engine.unpacking import BIAS, VALUES, unpack, unpack_plainly
from store.errors import CheckpointError, InvalidInput, UnsupportedFamily
from store.quantisation import FP8, GROUP, INT4, MXFP4, Coding
from store.records import Selection

Open = Callable[..., Engine]
CODING = Coding(MXFP4, (1, GROUP))
SUFFIXES = {"_blocks": "_scales", "_packed": "_scale"}
FIELDS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},
    "qwen3_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "qwen2_moe": {"hidden_size": 64, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 40},
    "deepseek_v3": {"hidden_size": 32, "moe_intermediate_size": 32},
}


def slowly(blocks: Tensor, scales: Tensor) -> Tensor:
    """One number at a time, as the format's specification has it: f32 [N, K]."""
    out = torch.empty(len(blocks), blocks.shape[1] * 2)
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            code = int(blocks[i, k // 2]) >> k % 2 * 4 & 15
            exponent = int(scales[i, k // GROUP])
            value = (-1) ** (code >> 3) * VALUES[code & 7]
            out[i, k] = (
                float("nan") if exponent == 255 else torch.tensor(value, dtype=torch.float64) * 2.0 ** (exponent - BIAS)
            )
    return out


def random_bytes(*shape: int, least: int = 0, most: int = 255) -> Tensor:
    return torch.randint(least, most + 1, shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (9, 320)])
def test_every_instruction_set_unpacks_what_the_format_says(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every exponent, those at the ends of what floats hold among them."""
    rows, columns = shape
    blocks, scales = random_bytes(rows, columns // 2), random_bytes(rows, columns // GROUP)
    scales[0, 0] = random.choice([0, 1, 2, 251, 252, 253, 254, 255])
    wanted = slowly(blocks, scales).to(dtype)
    for name in instruction_sets():
        found = torch.zeros(shape, dtype=dtype)
        Products(name).unpack(CODING, blocks, scales, found, rows)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    for way in (unpack, unpack_plainly):
        found = torch.zeros(shape, dtype=dtype)
        way(CODING, blocks, scales, found)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_weight_goes_to_the_nearest_number_and_one_that_is_there_stays() -> None:
    weight = torch.randn(7, 160) * torch.randn(7, 160).exp()
    weight[3, 32:64] = 0
    blocks, scales = quantise(weight)
    found = slowly(blocks, scales)
    table = torch.tensor([sign * value for value in VALUES for sign in (1, -1)])
    near = (table * 2.0 ** (scales.int() - BIAS).unsqueeze(-1)).repeat_interleave(GROUP, 1)  # [N, K, 16]
    best = (near - weight.unsqueeze(-1)).abs().amin(-1)
    torch.testing.assert_close((found - weight).abs(), best, rtol=0, atol=0)
    again = quantise(found)
    assert slowly(*again).equal(found)


def test_of_two_exponents_the_one_with_less_error_is_taken() -> None:
    """A group's largest number may be cut off to 6: where coarser steps cost less, the next power is best."""
    weight = torch.randn(64, 32)
    _, scales = quantise(weight)
    floor = weight.abs().amax(1, keepdim=True).log2().floor() - 2 + BIAS
    errors = []
    for more in (0, 1):
        scaled = torch.ldexp(weight, -(floor + more - BIAS).int())
        table = torch.tensor([*VALUES, *(-value for value in VALUES)])
        nearest = (scaled.unsqueeze(-1) - table).abs().amin(-1)
        errors.append(nearest.square().sum(1, keepdim=True) * 4.0 ** (floor + more - BIAS))
    wanted = floor + (errors[1] < errors[0])
    assert scales.equal(wanted.to(torch.uint8))
    assert 0 < int((errors[1] < errors[0]).sum()) < 64


def test_ties_go_to_the_even_code() -> None:
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    weight = torch.tensor([[*middles, 6.0, *(-middle for middle in middles), -6.0, *[0.5] * 16]])
    blocks, scales = quantise(weight)
    assert slowly(blocks, scales)[0, :8].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(InvalidInput, match="row of 40 weights"):
        quantise(torch.randn(2, 40))


def by_transformers(blocks: Tensor, scales: Tensor) -> Tensor:
    """Blocks [E, N, K / 32, 16] -> f32 [E, K, N], which is how gpt-oss's module keeps them."""
    found: Tensor = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return found


def as_meant(quantised: Path, wide: Path) -> Path:
    """`wide`, a folder of the same shapes, with the values that the MXFP4 folder holds."""
    held, meant = load_file(quantised / "model.safetensors"), {}
    for name, tensor in held.items():
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)
        if suffix is not None:
            scales = held[name.removesuffix(suffix) + SUFFIXES[suffix]]
            if suffix == "_blocks":
                meant[name.removesuffix(suffix)] = by_transformers(tensor, scales)
            else:
                alone = by_transformers(tensor.unflatten(-1, (-1, GROUP // 2)).unsqueeze(0), scales.unsqueeze(0))
                meant[name.removesuffix(suffix)] = alone[0].T.contiguous()
        elif tensor.dtype != torch.uint8:
            meant[name] = tensor
    save_file(meant, wide / "model.safetensors", metadata={"format": "pt"})
    return wide


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A checkpoint with four-bit experts, and one of the values that it means."""

    def make(family: str, wanted: Callable[[str], bool] | None = None) -> tuple[Path, Path]:
        fields = FIELDS[family]
        quantised = write_mxfp4(write_tiny(family, tmp_path / "four", dtype="float32", **fields), wanted)
        return quantised, as_meant(quantised, write_tiny(family, tmp_path / "wide", dtype="float32", **fields))

    return make


@pytest.mark.parametrize("kernel", ["own", "torch"])
@pytest.mark.parametrize("family", FIELDS)
def test_a_whole_model_is_transformers_with_the_unpacked_weights(
    family: str, kernel: str, pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair(family)
    engine = open_engine(quantised, dtype="float32", kernel=kernel)
    ids = torch.randint(0, 256, (2, 12))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(meant, experts_implementation="eager").eval()
        wanted = plain(input_ids=ids).logits
    whole = Selection.whole(engine.card.layers, engine.card.experts)
    torch.testing.assert_close(engine.forward(ids, mask, [whole, None]), wanted, atol=1e-4, rtol=1e-4)
    rng = random.Random(1)
    part = Selection.of([rng.sample(range(8), 5) for _ in range(engine.card.layers)])
    same = open_engine(meant, kernel=kernel).forward(ids, mask, [part, part])
    torch.testing.assert_close(engine.forward(ids, mask, [part, part]), same, atol=1e-4, rtol=1e-4)


def test_gpt_oss_as_published_is_what_transformers_makes_of_it(tmp_path: Path, open_engine: Open) -> None:
    """transformers unpacks the folder itself."""
    folder = write_mxfp4(write_tiny("gpt_oss", tmp_path / "oss", dtype="bfloat16", **FIELDS["gpt_oss"]))
    ids = torch.randint(0, 256, (2, 12))
    with torch.inference_mode():
        plain = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
        ).eval()
        wanted = plain(input_ids=ids).logits
    engine = open_engine(folder, dtype="float32")
    found = engine.forward(ids, torch.ones_like(ids), [None, None])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_four_bits_give_what_a_wide_copy_gives(
    dtype: str, tokens: int, pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    """To the bit in float32, where numbers are summed in the same order: few tokens and many, whole experts from the
    file's own bytes."""
    quantised, meant = pair("qwen3_moe")
    engines = [open_engine(folder, dtype=dtype, kernel="own") for folder in (quantised, meant)]
    ids = torch.randint(0, 256, (2, tokens))
    four, wide = (engine.forward(ids, torch.ones_like(ids), [None, None]) for engine in engines)
    if dtype == "float32":
        assert four.equal(wide)
    torch.testing.assert_close(four, wide, atol=0.05 * float(wide.abs().max()), rtol=0)
    assert engines[0].bank.layout.direct
    assert engines[0].bank.slot_bytes < engines[1].bank.slot_bytes * (0.4 if dtype == "bfloat16" else 0.2)


def test_matrices_of_attention_may_lie_in_four_bits_too(
    pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair("qwen3_moe", lambda name: name.endswith("_proj.weight"))
    names = load_file(quantised / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    ids = torch.randint(0, 256, (2, 9))
    found, wanted = (
        open_engine(folder, dtype="float32").forward(ids, torch.ones_like(ids), [None, None])
        for folder in (quantised, meant)
    )
    assert found.equal(wanted)


def test_the_smallest_budget_pages_a_quarter_of_the_bytes(
    pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, meant = pair("gpt_oss")
    wide = open_engine(meant, dtype="float32")
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
    expert = [tensor[0] for name, tensor in held.items() if ".layers.0.mlp.experts." in name]
    assert engine.card.expert_bytes == sum(tensor.numel() * tensor.element_size() for tensor in expert)
    assert engine.bank.slot_bytes <= engine.plan.slot_bytes


def test_a_checkpoint_whose_config_and_tensors_disagree_is_refused(
    pair: Callable[..., tuple[Path, Path]], open_engine: Open
) -> None:
    quantised, _ = pair("gpt_oss")
    config = json.loads((quantised / "config.json").read_text())
    del config["quantization_config"]
    (quantised / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedFamily, match="no quantization_config"):
        open_engine(quantised)
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (quantised / "config.json").write_text(json.dumps(config))
    held = load_file(quantised / "model.safetensors")
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(held | {scales: held[scales][:, :-1].contiguous()}, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj_scales is U8 .* needs U8"):
        open_engine(quantised)
    save_file({name: held[name] for name in held if name != scales}, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"scales .*down_proj_scales are missing"):
        open_engine(quantised)


@pytest.mark.parametrize("way", [MXFP4, INT4, FP8])
def test_experts_beside_quantised_attention_are_read_straight_into_their_slots(
    way: str, tmp_path: Path, open_engine: Open
) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", dtype="float32", **FIELDS["qwen3_moe"])
    engine = open_engine(write_quantised(way, folder, lambda name: ".self_attn." in name and "_proj" in name))
    assert engine.bank.layout.direct
    assert not engine.plan.quantised
    plain = open_engine(write_tiny("qwen3_moe", tmp_path / "n", dtype="float32", **FIELDS["qwen3_moe"]))
    assert engine.plan.staging_bytes == plain.plan.staging_bytes
    assert engine.forward(torch.arange(6).view(1, 6), torch.ones(1, 6, dtype=torch.long), [None]).isfinite().all()


@pytest.mark.parametrize("way", [MXFP4, INT4])
@pytest.mark.parametrize("layer", [0, 1])
def test_layers_of_which_some_lie_in_four_bits_are_refused(
    layer: int, way: str, tmp_path: Path, open_engine: Open
) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS["qwen3_moe"])
    write_quantised(way, folder, lambda name: f".layers.{layer}.mlp.experts." in name)
    with pytest.raises(UnsupportedFamily, match="they must be alike"):
        open_engine(folder)
