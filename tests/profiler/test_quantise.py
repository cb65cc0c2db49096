"""`moepager quantise`: a copy with four-bit experts that opens, profiles and answers, whole or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.rounding import rounded
from engine.tiny import write_tiny
from engine.unpacking import unpack_plainly
from profiler.corpus import Item, gather
from profiler.job import profile_task
from profiler.options import Options
from profiler.pack_commands import app
from profiler.pack_job import quantise_and_measure
from profiler.progress import ignore
from profiler.quantise import quantise_model
from store.checkpoint import CheckpointMap
from store.database import open_store
from store.errors import CheckpointError, Conflict, InvalidInput, UnsupportedFamily
from store.quantisation import FP8, INT4, MXFP4, coding_of, with_experts_in
from store.records import Selection, TaskRecord

CALIBRATION = gather([Item(f"number {n} " + "and more " * (n % 3), "yes" * (1 + n % 2)) for n in range(6)])
HELD_OUT = gather([Item(f"what of {n}?", "no") for n in range(3)])
FAMILIES = {
    "gpt_oss": {"hidden_size": 64, "intermediate_size": 32},
    "qwen2_moe": {"hidden_size": 64, "moe_intermediate_size": 32},
    "granitemoe": {"hidden_size": 64, "intermediate_size": 32},
    "mixtral": {"hidden_size": 32, "intermediate_size": 64},
}


def nothing(_: Path) -> dict[str, str]:
    return {}


def in_place(folder: Path, way: str = MXFP4) -> Path:
    """The same rounding in the checkpoint's own type: what the copy means."""
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        for name, tensor in held.items():
            if ("experts" not in name and "_linear" not in name) or tensor.dim() < 2 or name.endswith("bias"):
                continue
            turned = tensor.transpose(-1, -2) if "gate_up_proj" in name or name.endswith("down_proj") else tensor
            wide = torch.empty(turned.shape).flatten(0, -2)
            numbers, scales = rounded(way, turned)
            coding = coding_of(with_experts_in(way, {}))
            assert coding is not None
            plain = numbers.view(torch.uint8).flatten(0, -2)
            unpack_plainly(coding, plain, scales.flatten(0, -2), wide, turned.shape[-2])
            back = wide.view(turned.shape)
            held[name] = (back.transpose(-1, -2) if turned is not tensor else back).contiguous().to(tensor.dtype)
        save_file(held, file, metadata={"format": "pt"})
    return folder


# Bits of a weight with its scale, and what rounding normal weights changes; FP8's blocks are larger than the matrices.
LOSSES = {MXFP4: (4.25, 0.08, 0.14), INT4: (4.5, 0.06, 0.11), FP8: (None, 0.015, 0.035)}


@pytest.mark.parametrize("way", LOSSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_the_model_with_rounded_experts(family: str, way: str, tmp_path: Path) -> None:
    folder = write_tiny(family, tmp_path / "m", **FAMILIES[family])
    if (family, way) == ("gpt_oss", FP8):
        with pytest.raises(UnsupportedFamily, match="matrices transposed"):
            quantise_model(folder, tmp_path / "four", way, nothing, ignore)
        return
    card = quantise_model(folder, tmp_path / "four", way, nothing, ignore)
    bits, least, most = LOSSES[way]
    ids = torch.randint(0, 256, (2, 9))
    mask = torch.ones_like(ids)
    with (
        Engine.open(EngineConfig(in_place(folder, way), max_context=64)) as meant,
        Engine.open(EngineConfig(tmp_path / "four", max_context=64)) as four,
    ):
        found, wanted = (engine.forward(ids, mask, [None, None]) for engine in (four, meant))
        part = Selection.of([[0, 2, 3, 5]] * four.card.layers)
        some, same = (engine.forward(ids, mask, [part, None]) for engine in (four, meant))
        assert four.card.geometry.packed
        biases = sum(4 * count for count in four.card.geometry.expert)
        assert card["expert_bytes"][1] == four.card.layers * four.card.experts * four.card.expert_bytes
        assert four.plan.slots_in == way
        if bits is not None:
            assert (four.card.expert_bytes - biases) * 32 == (meant.card.expert_bytes - biases) * bits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(some, same, atol=1e-4, rtol=1e-4)
    assert all(least < error < most for error in card["relative_error"])
    assert card == json.loads((tmp_path / "four" / "pack.json").read_text())


def test_a_copy_is_profiled_as_any_model_with_every_kind_of_statistic(tmp_path: Path) -> None:
    """Those of channels inside experts, too."""
    folder = write_tiny("qwen2_moe", tmp_path / "m", **FAMILIES["qwen2_moe"])
    quantise_model(folder, tmp_path / "four", MXFP4, nothing, ignore)
    options = Options(scorers=["camera", "reap", "easy_ep", "peu"], rows=4)
    found = []
    for number, model in enumerate((tmp_path / "four", in_place(folder))):
        with (
            open_store(f"sqlite:///{tmp_path}/{number}.db") as store,
            Engine.open(EngineConfig(model, max_context=128, max_batch=4)) as engine,
        ):
            profile = profile_task(
                engine, store, TaskRecord("t"), CALIBRATION, HELD_OUT, embedder=HashEmbedder(), options=options
            )
            found.append((profile.statistics, store.selections.find(profile.id)))
    (four, chosen), (meant, wanted) = found
    assert four.keys() == meant.keys()
    for name, values in four.items():
        torch.testing.assert_close(torch.as_tensor(values), torch.as_tensor(meant[name]), rtol=1e-4, atol=1e-5)
    assert [each.selection for each in chosen] == [each.selection for each in wanted]


def test_the_card_says_what_both_do_on_other_text(tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "m", **FAMILIES["mixtral"])
    config = EngineConfig(folder, max_context=128, max_batch=4)
    card = quantise_and_measure(config, HELD_OUT, tmp_path / "four", MXFP4, 4, ignore)
    assert card["evaluation"]["pack"]["items"] == card["evaluation"]["whole"]["items"] == 3
    assert card["evaluation"]["pack"]["nll"] != card["evaluation"]["whole"]["nll"]


def test_the_command_says_what_it_has_done_and_plans_the_copy(tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "m", dtype="bfloat16", **FAMILIES["mixtral"])
    out = tmp_path / "four"
    done = CliRunner().invoke(app, ["quantise", "--model", str(folder), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    assert "(26.6%)" in done.output
    assert json.loads(done.output.splitlines()[-1])["format"] == "mxfp4"
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"
    names = CheckpointMap.open(out).tensors
    w1 = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert (names[f"{w1}_packed"].shape, names[f"{w1}_scale"].shape) == ((64, 16), (64, 1))


def test_what_cannot_be_quantised_leaves_nothing(tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "m", **FAMILIES["mixtral"])
    quantise_model(folder, tmp_path / "four", MXFP4, nothing, ignore)
    with pytest.raises(Conflict, match="exists"):
        quantise_model(folder, tmp_path / "four", MXFP4, nothing, ignore)
    with pytest.raises(UnsupportedFamily, match="quantised already"):
        quantise_model(tmp_path / "four", tmp_path / "again", MXFP4, nothing, ignore)
    odd = write_tiny("mixtral", tmp_path / "odd", hidden_size=32, intermediate_size=48)
    with pytest.raises(InvalidInput, match="row of 48 weights"):
        quantise_model(odd, tmp_path / "again", MXFP4, nothing, ignore)
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 4] = torch.nan
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3\.weight has NaN"):
        quantise_model(folder, tmp_path / "again", MXFP4, nothing, ignore)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["four", "m", "odd"]


def test_a_pack_of_a_copy_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "m", dtype="bfloat16", **FAMILIES["mixtral"])
    quantise_model(folder, tmp_path / "four", MXFP4, nothing, ignore)
    (tmp_path / "c.jsonl").write_text('{"prompt": "one", "response": "two"}\n')
    arguments = ["pack", "--model", str(tmp_path / "four"), "--task", "t", "--calibration", str(tmp_path / "c.jsonl")]
    arguments += ["--store", f"sqlite:///{tmp_path}/s.db", "--channels", "0.5", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UnsupportedFamily)
    assert "unquantised" in str(done.exception)
