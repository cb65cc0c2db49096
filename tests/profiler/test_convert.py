"""GPTQ checkpoints turned over: packed here bit by bit as AutoGPTQ packs, held to plain transformers with the weights
that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.convert import convert_model
from profiler.pack_commands import app
from profiler.progress import ignore
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, Conflict, MoepagerError, UnsupportedFamily
from store.quantisation import INT4, Coding, coding_of
from store.records import Selection

FIELDS: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "intermediate_size": 64, "head_dim": 16}


def _packed(numbers: Tensor) -> Tensor:
    """Integers 0 to 15 [R, C] -> i32 [R / 8, C], eight of a column to a word, the first in its lowest bits."""
    rows, columns = numbers.shape
    words = torch.zeros(rows // 8, columns, dtype=torch.int64)
    for row in range(rows):
        words[row // 8] |= numbers[row].long() << 4 * (row % 8)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _gptq(weight: Tensor, group: int, zero: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of `weight` [N, K], and the weight that they stand for."""
    rows, columns = weight.shape
    size = columns if group == -1 else group
    scales = (weight.view(rows, -1, size).abs().amax(-1) / 7).clamp(min=1e-4).half()  # [N, G]
    wide = scales.float().repeat_interleave(size, 1)
    numbers = (weight.float() / wide).round().clamp(-8, 7) + 8  # [N, K]
    zeros = torch.full((columns // size, rows), zero)
    tensors = {
        "qweight": _packed(numbers.T),
        "qzeros": _packed(zeros.T).T.contiguous(),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // size).int(),
    }
    return tensors, ((numbers - 8) * wide).to(weight.dtype)


def _is_quantised(name: str) -> bool:
    return name.endswith("_proj.weight") or (name.endswith(".weight") and ".experts." in name)


def _write(folder: Path, group: int = 32, zero: int = 7, **settings: Any) -> Path:
    """`folder` as GPTQ, and beside it `plain`, the model that it stands for."""
    held, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if _is_quantised(name):
            tensors, meant[name] = _gptq(tensor, group, zero)
            held |= {f"{name.removesuffix('weight')}{part}": each for part, each in tensors.items()}
        else:
            held[name] = meant[name] = tensor
    plain = folder.with_name("plain")
    plain.mkdir()
    for file in folder.glob("*.json"):
        (plain / file.name).write_bytes(file.read_bytes())
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    named = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False}
    config["quantization_config"] = named | settings
    (folder / "config.json").write_text(json.dumps(config))
    return plain


def _change(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


V2 = {"checkpoint_format": "gptq_v2"}
AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}


NOT_THE_ROUTER = {"dynamic": {"-:.*gate": {}}}


@pytest.mark.parametrize(
    ("group", "zero", "settings"),
    [(32, 7, {}), (64, 8, V2), (-1, 7, {}), (32, 7, AUTO_ROUND), (32, 7, NOT_THE_ROUTER)],
)
def test_a_copy_is_the_model_that_the_integers_stand_for(
    group: int, zero: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS)
    plain = _write(folder, group, zero, **settings)
    card = convert_model(folder, tmp_path / "copy", ignore)
    ids = torch.randint(0, 256, (2, 9))
    mask, part = torch.ones_like(ids), Selection.of([[0, 2, 3, 5]] * 3)
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(plain).eval()(input_ids=ids, attention_mask=mask).logits
    with (
        Engine.open(EngineConfig(tmp_path / "copy", max_context=64)) as copy,
        Engine.open(EngineConfig(plain, max_context=64)) as meant,
    ):
        assert copy.plan.slots_in == INT4
        torch.testing.assert_close(copy.forward(ids, mask, [None, None]), wanted, atol=1e-4, rtol=1e-4)
        some, same = (engine.forward(ids, mask, [part, None]) for engine in (copy, meant))
    torch.testing.assert_close(some, same, atol=1e-4, rtol=1e-4)
    assert coding_of(json.loads((tmp_path / "copy" / "config.json").read_text())) == Coding(INT4, (1, max(group, 0)))
    assert card == json.loads((tmp_path / "copy" / "pack.json").read_text())
    assert (card["matrices"], card["format"], card["relaid_from"]) == (3 * (8 * 3 + 4), "int4", "gptq")


def test_what_is_not_quantised_is_copied_and_named_for_other_readers(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS)
    _write(folder)
    convert_model(folder, tmp_path / "copy", ignore)
    before, after = load_file(folder / "model.safetensors"), {}
    for file in (tmp_path / "copy").glob("*.safetensors"):
        after |= load_file(file)
    plain = [name for name in before if name.rpartition(".")[2] not in ("qweight", "qzeros", "scales", "g_idx")]
    assert all(after[name].equal(before[name]) for name in plain)
    settings = json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(3))]


def test_files_are_of_bearable_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS)
    _write(folder)
    monkeypatch.setattr("profiler.convert.SHARD_BYTES", 1 << 15)
    convert_model(folder, tmp_path / "copy", ignore)
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert len(files) > 4
    whole = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert CheckpointMap.open(tmp_path / "copy").weight_bytes == whole


def _zero_points(held: dict[str, Tensor]) -> None:
    held["model.layers.1.mlp.experts.3.up_proj.qzeros"][0, 0] = 0x77777767


def _out_of_order(held: dict[str, Tensor]) -> None:
    held["model.layers.1.self_attn.q_proj.g_idx"] = held["model.layers.1.self_attn.q_proj.g_idx"].flip(0).contiguous()


def _no_number(held: dict[str, Tensor]) -> None:
    held["model.layers.2.mlp.experts.0.down_proj.scales"][0, 0] = float("nan")


def _short(held: dict[str, Tensor]) -> None:
    name = "model.layers.2.mlp.experts.0.gate_proj.scales"
    held[name] = held[name][:1].contiguous()


def _short_order(held: dict[str, Tensor]) -> None:
    name = "model.layers.1.self_attn.v_proj.g_idx"
    held[name] = held[name][1:].contiguous()


def _without(held: dict[str, Tensor]) -> None:
    del held["model.layers.0.mlp.experts.7.down_proj.qzeros"]


@pytest.mark.parametrize(
    ("settings", "change", "error", "message"),
    [
        ({"bits": 8}, None, UnsupportedFamily, "GPTQ with 8 bits"),
        ({"sym": False}, None, UnsupportedFamily, "symmetric False"),
        ({"dynamic": {".*down_proj": {"bits": 8}}}, None, UnsupportedFamily, "8.*in some modules"),
        ({"group_size": 24}, None, UnsupportedFamily, "groups of 24 columns"),
        ({"quant_method": "awq"}, None, UnsupportedFamily, "no GPTQ checkpoint: its quant_method is 'awq'"),
        (V2, None, UnsupportedFamily, "zero points that are not symmetric's"),
        ({}, _zero_points, UnsupportedFamily, r"experts.3.up_proj.qzeros has zero points"),
        ({}, _out_of_order, UnsupportedFamily, "columns out of order"),
        ({}, _no_number, CheckpointError, "down_proj.scales has NaN"),
        ({}, _short, CheckpointError, r"gate_proj.qweight has 64 rows of 64 columns.* its scales should be \[2, 64\]"),
        ({}, _short_order, CheckpointError, r"its g_idx should be \[64\]; they are \[63\]"),
        ({}, _without, CheckpointError, "has no qzeros beside it"),
    ],
)
def test_what_would_be_another_model_is_refused_and_leaves_nothing(
    settings: dict[str, Any], change: Callable[[dict[str, Tensor]], None] | None, error: type[MoepagerError],
    message: str, tmp_path: Path,
) -> None:  # fmt: skip
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS)
    _write(folder, **settings) if "group_size" not in settings else _write(folder) and _say_group(folder)
    if change is not None:
        _change(folder, change)
    with pytest.raises(error, match=message):
        convert_model(folder, tmp_path / "copy", ignore)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["m", "plain"]


def _say_group(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 24
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_that_is_there_is_refused(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", **FIELDS)
    with pytest.raises(Conflict, match="exists"):
        convert_model(folder, folder, ignore)


def test_the_command_says_what_it_did_and_the_original_says_what_to_do(tmp_path: Path) -> None:
    folder = write_tiny("qwen3_moe", tmp_path / "m", dtype="float16", **FIELDS)
    _write(folder)
    with pytest.raises(UnsupportedFamily, match="`moepager convert` writes a copy"):
        Engine.open(EngineConfig(folder))
    result = CliRunner().invoke(app, ["convert", "--model", str(folder), "--out", str(tmp_path / "copy"), "--json"])
    assert result.exit_code == 0, result.output
    assert "84 matrices turned over" in result.output
    assert "--dtype bfloat16" in result.output
    assert json.loads(result.output.splitlines()[-1])["matrices"] == 84
    with Engine.open(EngineConfig(tmp_path / "copy", dtype="bfloat16", max_context=64)) as engine:
        assert engine.plan.slots_in == INT4
