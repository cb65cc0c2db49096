"""What can be opened and what can't: other families by introspection alone, and refusals that name the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

from engine.engine import Engine
from engine.tiny import write_byte_tokenizer, write_tiny
from store.errors import CheckpointError, MoepagerError, UnsupportedFamily

Open = Callable[..., Engine]
Checkpoint = Callable[..., Path]

FIELDS: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "pad_token_id": 0,
}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Any family that transformers knows, small and random, in hub layout."""

    def make(family: str, **fields: Any) -> Path:
        config = AutoConfig.for_model(family, **(FIELDS | fields))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / family)
        write_byte_tokenizer(tmp_path / family)
        return tmp_path / family

    return make


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("llama", {}, "no routed experts"),
        ("llama4_text", LOCAL | {"intermediate_size_mlp": 16}, r"does not return \(logits, weights, index\)"),
    ],
)
def test_a_family_without_the_joints_is_refused_with_the_reason(
    family: str, fields: dict[str, Any], reason: str, write: Callable[..., Path], open_engine: Open
) -> None:
    with pytest.raises(UnsupportedFamily, match=reason):
        open_engine(write(family, **fields))


def test_a_router_that_is_given_more_than_its_blocks_weights_is_refused(
    tmp_path: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias itself is adopted by the router, see the families; anything computed from it could not be limited."""
    stock = MiniMaxM2TopKRouter.__call__
    monkeypatch.setattr(MiniMaxM2TopKRouter, "__call__", lambda self, x, bias: stock(self, x, bias + 0))
    with pytest.raises(UnsupportedFamily, match="routes by more than the hidden states"):
        open_engine(write_tiny("minimax_m2", tmp_path / "m"))


def test_a_wrapper_of_several_modalities_is_refused_by_what_it_is(tmp_path: Path, open_engine: Open) -> None:
    text = FIELDS | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    with pytest.raises(UnsupportedFamily, match="no language model for model_type 'qwen3_vl_moe' alone"):
        open_engine(tmp_path)


def test_a_wrapper_whose_language_model_stands_alone_too_is_served_by_that(
    tmp_path: Path, open_engine: Open, checkpoint: Checkpoint
) -> None:
    """As Qwen3.5 is published: settings in text_config, tensors under model.language_model, a tower for pictures."""
    text = json.loads((checkpoint("qwen3_5_moe_text") / "config.json").read_text())
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
    }  # fmt: skip
    config = AutoConfig.for_model("qwen3_5_moe", text_config=text, vision_config=vision, tie_word_embeddings=False)
    plain = AutoModelForImageTextToText.from_config(config).eval()
    plain.save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    engine, ids = open_engine(tmp_path), torch.arange(7).unsqueeze(0)
    assert any("visual" in name for name in engine.checkpoint.tensors)
    alone = open_engine(checkpoint("qwen3_5_moe_text"))
    assert engine.plan.dense_bytes == alone.plan.dense_bytes  # the tower is not loaded, and not planned
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3_5_moe"
    with torch.inference_mode():
        wanted = plain(input_ids=ids).logits
    torch.testing.assert_close(engine.forward(ids, torch.ones_like(ids), [None]), wanted, rtol=0, atol=1e-3)


@pytest.fixture
def altered(checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a good checkpoint with its config or its tensors changed."""

    def make(
        config: dict[str, Any] | None = None, tensors: Callable[[dict[str, torch.Tensor]], None] | None = None
    ) -> Path:
        folder = tmp_path / "altered"
        shutil.copytree(checkpoint("qwen2_moe"), folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
        if tensors is not None:
            held = load_file(folder / "model.safetensors")
            tensors(held)
            save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def _drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def _replace(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"config": {"quantization_config": {"quant_method": "gptq"}}}, UnsupportedFamily, "quantised by gptq"),
        ({"config": {"model_type": "no_such_model"}}, UnsupportedFamily, "can't build the model"),
        (
            {"config": {"layer_types": ["compressed_attention"] * 3}},
            UnsupportedFamily,
            "compressed_attention keep a state",
        ),
        ({"config": {"layer_types": ["linear_attention"] * 3}}, UnsupportedFamily, "only contain LinearAttention"),
        ({"config": {"hidden_size": "32"}}, CheckpointError, "no whole number hidden_size"),
        ({"config": {"moe_intermediate_size": 24}}, UnsupportedFamily, "config.json and weights belong to different"),
        ({"tensors": _drop("model.norm.weight")}, CheckpointError, "no tensor for model.norm.weight"),
        ({"tensors": _replace("model.norm.weight", torch.ones(7))}, CheckpointError, r"shape \[7\], config.json wants"),
        (
            {"tensors": _replace("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn))},
            UnsupportedFamily,
            "stored as F8_E4M3",
        ),
    ],
)
def test_a_checkpoint_that_can_not_be_served_is_refused_with_the_reason(
    change: dict[str, Any], error: type[MoepagerError], message: str, altered: Callable[..., Path], open_engine: Open
) -> None:
    with pytest.raises(error, match=message):
        open_engine(altered(**change))


def test_tensors_that_the_model_does_not_have_are_ignored(altered: Callable[..., Path], open_engine: Open) -> None:
    engine = open_engine(altered(tensors=_replace("model.left_over.weight", torch.ones(4))))
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert engine.forward(ids, torch.ones_like(ids), [None]).isfinite().all()


def test_a_refused_checkpoint_leaves_no_file_open(altered: Callable[..., Path], open_engine: Open) -> None:
    folder = altered(tensors=_drop("model.norm.weight"))
    with pytest.raises(CheckpointError):
        open_engine(folder)
    opened = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [path for path in opened if str(path).startswith(str(folder))]
