from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, MismatchError, UnsupportedFamily
from store.experts import ExpertMap, Kind, Part
from store.records import ExpertKey, Selection

WriteModel = Callable[..., Path]
Tensors = dict[str, np.ndarray]

H, I = 6, 5  # noqa: E741 - hidden and intermediate width, as papers call them

RNG = np.random.default_rng(7)


def rand(*shape: int) -> np.ndarray:
    return RNG.random(shape, np.float32)


def single(
    layer: int, experts: int, module: str = "mlp", names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
) -> Tensors:
    """One tensor for each expert and projection, and the router."""
    made = {f"model.layers.{layer}.{module}.gate.weight": rand(experts, H)}
    for expert in range(experts):
        for name in names:
            shape = (H, I) if name in {"down_proj", "w2"} else (I, H)
            made[f"model.layers.{layer}.{module}.experts.{expert}.{name}.weight"] = rand(*shape)
    return made


def fused(layer: int, experts: int) -> Tensors:
    """gpt-oss: one tensor for all experts, with biases."""
    mlp = f"model.layers.{layer}.mlp"
    return {
        f"{mlp}.router.weight": rand(experts, H),
        f"{mlp}.router.bias": rand(experts),
        f"{mlp}.experts.gate_up_proj": rand(experts, H, 2 * I),
        f"{mlp}.experts.gate_up_proj_bias": rand(experts, 2 * I),
        f"{mlp}.experts.down_proj": rand(experts, I, H),
        f"{mlp}.experts.down_proj_bias": rand(experts, H),
    }


def dense(layer: int) -> Tensors:
    return {f"model.layers.{layer}.mlp.{name}_proj.weight": rand(4, 4) for name in ("gate", "up", "down")}


def mapped(write: WriteModel, tensors: Tensors, config: Mapping[str, Any] | None = None, shards: int = 1) -> ExpertMap:
    return ExpertMap.build(CheckpointMap.open(write(tensors, config, shards)))


def read(part: Part) -> bytes:
    with part.file.open("rb") as stream:
        stream.seek(part.offset)
        return stream.read(part.nbytes)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("mlp", ("gate_proj", "up_proj", "down_proj")),
        ("block_sparse_moe", ("w1", "w2", "w3")),
        ("mixer", ("up_proj", "down_proj")),
    ],
)
def test_experts_with_tensors_of_their_own_are_found_whatever_they_are_called(
    write_model: WriteModel, module: str, names: tuple[str, ...], shards: int
) -> None:
    tensors = single(0, 12, module, names) | single(1, 12, module, names)
    experts = mapped(write_model, tensors, shards=shards)
    assert (experts.layers, experts.experts) == ((0, 1), 12)
    assert experts.modules == (f"model.layers.0.{module}.experts", f"model.layers.1.{module}.experts")
    assert experts.dense == (f"model.layers.0.{module}.gate.weight", f"model.layers.1.{module}.gate.weight")
    for layer in range(2):
        for expert in range(12):
            span = experts.span(ExpertKey(layer, expert))
            assert span.key == (layer, expert)
            assert [part.projection for part in span.parts] == sorted(f"{name}.weight" for name in names)
            for part in span.parts:
                array = tensors[f"model.layers.{layer}.{module}.experts.{expert}.{part.projection}"]
                assert (read(part), part.shape, part.dtype) == (array.tobytes(), array.shape, "F32")


def test_the_slice_of_each_expert_is_cut_from_fused_tensors(write_model: WriteModel) -> None:
    tensors = fused(0, 4) | fused(1, 4)
    experts = mapped(write_model, tensors)
    assert experts.experts == 4
    assert experts.dense == tuple(name for name in tensors if ".router." in name)
    names = ["down_proj", "down_proj_bias", "gate_up_proj", "gate_up_proj_bias"]
    for layer in range(2):
        for expert in range(4):
            span = experts.span(ExpertKey(layer, expert))
            assert [part.projection for part in span.parts] == names
            for part in span.parts:
                array = tensors[f"model.layers.{layer}.mlp.experts.{part.projection}"][expert]
                assert (read(part), part.shape) == (array.tobytes(), array.shape)


def test_fused_tensors_without_the_word_are_known_by_the_router_beside_them(write_model: WriteModel) -> None:
    moe = "model.layers.0.block_sparse_moe"  # Granite
    tensors = {
        f"{moe}.input_linear.weight": rand(4, 2 * I, H),
        f"{moe}.output_linear.weight": rand(4, H, I),
        f"{moe}.router.layer.weight": rand(4, H),
        "model.layers.0.conv1d.weight": rand(4, 1, 3),
    }
    experts = mapped(write_model, tensors)
    assert experts.modules == (moe,)
    assert experts.dense == (f"{moe}.router.layer.weight", "model.layers.0.conv1d.weight")
    parts = experts.span(ExpertKey(0, 3)).parts
    assert [read(part) for part in parts] == [
        tensors[f"{moe}.input_linear.weight"][3].tobytes(),
        tensors[f"{moe}.output_linear.weight"][3].tobytes(),
    ]


def test_dense_first_layers_make_decoder_layers_and_moe_layers_count_apart(write_model: WriteModel) -> None:
    tensors = dense(0) | dense(1) | single(2, 3) | dense(3) | single(11, 3)  # 11 sorts after 2 as a number only
    experts = mapped(write_model, tensors)
    assert experts.layers == (2, 11)
    key = "model.layers.11.mlp.experts.2.up_proj.weight"
    assert read(experts.span(ExpertKey(1, 2)).parts[2]) == tensors[key].tobytes()
    assert {name for name in tensors if "layers.0." in name or "layers.3." in name} <= set(experts.dense)


def test_shared_experts_and_router_biases_are_dense(write_model: WriteModel) -> None:
    shared = {
        "model.layers.0.mlp.shared_expert.gate_proj.weight": rand(I, H),
        "model.layers.0.mlp.shared_expert_gate.weight": rand(1, H),
        "model.layers.0.mlp.shared_experts.down_proj.weight": rand(H, I),
        "model.layers.0.mlp.gate.e_score_correction_bias": rand(4),
        "model.layers.0.mlp.experts.e_score_correction_bias": rand(4),
    }
    experts = mapped(write_model, single(0, 4) | shared)
    assert set(experts.dense) == {*shared, "model.layers.0.mlp.gate.weight"}
    assert len(experts.span(ExpertKey(0, 0)).parts) == 3


def test_scales_beside_quantised_weights_are_further_parts(write_model: WriteModel) -> None:
    tensors: dict[str, np.ndarray] = {}
    for name, array in single(0, 4).items():
        if ".experts." not in name:
            tensors[name] = array
            continue
        tensors[f"{name}_packed"] = RNG.integers(0, 2**31, (6, 4)).astype(np.int32)  # [6, 32]
        tensors[f"{name}_scale"] = rand(6, 1).astype(np.float16)
        tensors[f"{name}_shape"] = np.array([6, 32])
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32}
    settings = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}}
    experts = mapped(write_model, tensors, {"quantization_config": settings | {"format": "pack-quantized"}})
    span = experts.span(ExpertKey(0, 2))
    assert [(part.projection, part.kind, part.matrix) for part in span.parts[:2]] == [
        ("down_proj.weight_packed", Kind.NUMBERS, ("down_proj.weight", (6, 32))),
        ("down_proj.weight_scale", Kind.SCALES, ("down_proj.weight", (6, 32))),
    ]
    assert span.nbytes == 3 * 6 * (16 + 2) == experts.expert_bytes[0]
    assert not any("weight_" in name for name in experts.dense)


def test_blocks_of_four_bit_weights_are_cut_too(write_model: WriteModel) -> None:
    blocks = RNG.integers(0, 255, (4, 2 * I, 3, 16)).astype(np.uint8)  # MXFP4, as gpt-oss ships it
    scales = RNG.integers(0, 255, (4, 2 * I, 3)).astype(np.uint8)
    mlp = "model.layers.0.mlp.experts"
    tensors = {f"{mlp}.gate_up_proj_blocks": blocks, f"{mlp}.gate_up_proj_scales": scales}
    experts = mapped(write_model, tensors, {"quantization_config": {"quant_method": "mxfp4"}})
    assert experts.quantised is not None
    assert experts.quantised.scales == {f"{mlp}.gate_up_proj_scales"}
    assert [read(part) for part in experts.span(ExpertKey(0, 1)).parts] == [blocks[1].tobytes(), scales[1].tobytes()]


def test_prediction_heads_are_neither_dense_nor_experts(write_model: WriteModel) -> None:
    head = single(2, 3) | {"model.layers.2.eh_proj.weight": rand(H, 2 * H)}  # DeepSeek-V3: one layer past the last
    named = {
        name.replace("model.layers.2", "mtp.layers.0"): array for name, array in single(2, 3).items()
    }  # Qwen3-Next
    experts = mapped(write_model, single(0, 3) | single(1, 3) | head | named, {"num_hidden_layers": 2})
    assert experts.layers == (0, 1)
    assert set(experts.surplus) == {*head, *named}
    assert not {*head, *named} & set(experts.dense)


def test_the_depth_of_the_text_model_does_not_cut_other_towers(write_model: WriteModel) -> None:
    vision = {"vision.layers.5.mlp.fc.weight": rand(2, 2)}
    config = {"text_config": {"num_hidden_layers": 1, "num_experts": 3}}
    experts = mapped(write_model, single(0, 3) | vision, config)
    assert (set(vision) <= set(experts.dense), experts.surplus) == (True, ())


def test_every_byte_of_the_weights_is_an_experts_or_dense(write_model: WriteModel) -> None:
    tensors = dense(0) | single(1, 5) | single(2, 5) | {"model.embed_tokens.weight": rand(30, H)}
    experts = mapped(write_model, tensors)
    rest = sum(tensors[name].nbytes for name in experts.dense)
    assert experts.total_bytes + rest == sum(array.nbytes for array in tensors.values())
    runs = sorted((p.offset, p.nbytes) for row in experts.spans for span in row for p in span.parts)
    assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(runs))


def test_selection_bytes_are_those_of_its_experts(write_model: WriteModel) -> None:
    experts = mapped(write_model, single(0, 4) | single(3, 4))
    one = 3 * H * I * 4
    assert experts.selection_bytes(Selection.of([[0, 2, 3], []])) == 3 * one
    assert experts.selection_bytes(Selection.whole(2, 4)) == experts.total_bytes == 8 * one


@pytest.mark.parametrize("selection", [[[0]], [[0], [0], [0]], [[0], [4]], [[0, 9], []]])
def test_a_selection_of_another_model_is_refused(write_model: WriteModel, selection: list[list[int]]) -> None:
    experts = mapped(write_model, single(0, 4) | single(1, 4))
    with pytest.raises(MismatchError, match=r"2 MoE layers of 4 experts.*another model"):
        experts.selection_bytes(Selection.of(selection))


@pytest.mark.parametrize("key", [ExpertKey(2, 0), ExpertKey(0, 4), ExpertKey(-1, 0), ExpertKey(0, -1)])
def test_an_expert_that_is_not_there_is_refused(write_model: WriteModel, key: ExpertKey) -> None:
    with pytest.raises(MismatchError, match="There is no expert"):
        mapped(write_model, single(0, 4) | single(1, 4)).span(key)


def without(tensors: Tensors, *words: str) -> Tensors:
    return {name: array for name, array in tensors.items() if not all(word in name for word in words)}


@pytest.mark.parametrize(
    ("tensors", "config", "said"),
    [
        (
            without(single(3, 8), "experts.7.down_proj"),
            {},
            r"Expert 7 of model\.layers\.3\.mlp\.experts lacks down_proj\.weight",
        ),
        (
            without(single(3, 8), "experts.5."),
            {},
            r"Expert 5 of .* lacks down_proj\.weight, gate_proj\.weight, up_proj",
        ),
        (single(0, 8) | without(single(1, 8), "down_proj"), {}, r"Expert 0 of model\.layers\.1.* lacks down_proj"),
        (
            without(fused(0, 4), "down_proj_bias") | fused(1, 4),
            {},
            r"Expert 0 of model\.layers\.0.* lacks down_proj_bias",
        ),
        (
            single(0, 8) | single(1, 7),
            {},
            r"layers\.1\.mlp\.experts has 7 experts, model\.layers\.0\.mlp\.experts has 8",
        ),
        (single(0, 7), {"num_experts": 8}, r"has 7 experts, config\.json says 8"),
        (single(0, 7), {"text_config": {"n_routed_experts": 8}}, "config.json says 8"),
        (fused(0, 4), {"num_local_experts": 5}, "has 4 experts, config.json says 5"),
        (
            fused(0, 4) | {"model.layers.0.mlp.experts.down_proj": rand(3, I, H)},
            {},
            r"disagree on its number of experts: \[3, 4\]",
        ),
        (single(0, 4) | without(single(1, 4), ".experts."), {}, r"layers\.1\.mlp has a router for 4 experts, but none"),
        (
            single(0, 3) | {"model.layers.0.mlp.experts.1.up_proj.weight": rand(I, H + 1)},
            {},
            r"Expert 1 of .* has up_proj\.weight as F32 \[5, 7\], expert 0 as F32 \[5, 6\]",
        ),
    ],
)
def test_a_checkpoint_with_holes_is_refused(
    write_model: WriteModel, tensors: Tensors, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        mapped(write_model, tensors, config)
    assert "Download the checkpoint again" in str(caught.value)
    assert not isinstance(caught.value, UnsupportedFamily)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (dense(0), "no routed experts.*plain transformers"),
        ({"model.layers.0.mlp.shared_experts.up_proj.weight": rand(I, H)}, "no routed experts"),
        ({"experts.0.w1.weight": rand(I, H)}, "no routed experts"),  # in no layer
        ({"blocks.0.ffn.experts.mlp.w1": rand(4 * I, H)}, "no tensor with a slice for each expert"),  # DBRX
        (
            fused(0, 4) | {"model.layers.0.mlp.experts.extra": rand(3, 8)},
            r"experts\.extra \[3, 8\] can't be cut into 4",
        ),
        (
            single(0, 4) | single(0, 4, module="attn"),
            r"experts in model\.layers\.0\.attn\.experts and model\.layers\.0\.mlp",
        ),
        (
            single(0, 4) | {name.replace("model.", "vision."): array for name, array in single(0, 4).items()},
            r"2 stacks of layers: model\.layers, vision\.layers",
        ),
    ],
)
def test_a_layout_that_can_not_be_paged_is_called_unsupported(
    write_model: WriteModel, tensors: Tensors, said: str
) -> None:
    with pytest.raises(UnsupportedFamily, match=said):
        mapped(write_model, tensors)
