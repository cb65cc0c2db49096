"""Quantised weights and their scales in a header: what belongs together, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from store.errors import CheckpointError, UnsupportedFamily
from store.quantisation import FP8, GROUP, INT4, MXFP4, WHOLE_ROW, Coding
from store.quantised import Matrix, read_quantised, scratch_bytes
from store.shard import TensorSpan

EIGHT: dict[str, Any] = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
FOUR: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}


def compressed(name: str, **weights: Any) -> dict[str, Any]:
    group = {"weights": weights, "format": name}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}}


INTEGERS = compressed("pack-quantized", num_bits=4, strategy="group", group_size=64)


def spans(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpan]:
    named = {name.replace("__", "."): of for name, of in shapes.items()}
    return {name: TensorSpan(name, Path("f"), 0, 1, dtype, shape) for name, (dtype, shape) in named.items()}


def test_eight_bit_floats_have_scales_of_their_blocks() -> None:
    tensors = spans(
        a=("F8_E4M3", (129, 128)), a_scale_inv=("F32", (2, 1)), b=("BF16", (4, 4)),
        c=("F8_E4M3", (8, 256, 300)), c_scale_inv=("BF16", (8, 2, 3)),
    )  # fmt: skip
    found = read_quantised(EIGHT, tensors)
    assert found is not None
    assert found.coding == Coding(FP8, (128, 128))
    assert found.matrices["a"] == found.matrices["a_scale_inv"] == Matrix("a", "a", "a_scale_inv", (129, 128))
    assert found.matrices.keys() == tensors.keys() - {"b"}
    assert found.scales == {"a_scale_inv", "c_scale_inv"}


def test_those_of_compressed_tensors_may_have_one_for_each_row() -> None:
    config = compressed("float-quantized", num_bits=8, strategy="channel", type="float")
    found = read_quantised(config, spans(a__weight=("F8_E4M3", (6, 40)), a__weight_scale=("BF16", (6, 1))))
    assert found is not None
    assert found.coding == Coding(FP8, (1, WHOLE_ROW))
    assert found.scales == {"a.weight_scale"}


def test_both_layouts_of_four_bit_floats_have_scales_for_each_matrix() -> None:
    tensors = spans(
        a_blocks=("U8", (8, 64, 3, 16)), a_scales=("U8", (8, 64, 3)), a_bias=("BF16", (8, 64)),
        b_packed=("U8", (64, 48)), b_scale=("F8_E8M0", (64, 3)), per_expert_scale=("BF16", (8,)),
    )  # fmt: skip
    found = read_quantised(FOUR, tensors)
    assert found is not None
    assert found.coding == Coding(MXFP4, (1, GROUP))
    assert found.matrices["a_scales"] == Matrix("a", "a_blocks", "a_scales", (8, 64, 96))
    assert found.matrices["b_packed"] == Matrix("b", "b_packed", "b_scale", (64, 96))
    assert len(found.matrices) == 4


def test_integers_are_eight_a_word_and_their_shape_is_told_twice() -> None:
    tensors = spans(
        a__weight_packed=("I32", (6, 16)), a__weight_scale=("BF16", (6, 2)), a__weight_shape=("I64", (2,)),
        b=("BF16", (3, 3)), per_expert_scale=("F32", (8,)),
    )  # fmt: skip
    found = read_quantised(INTEGERS, tensors)
    assert found is not None
    assert found.coding == Coding(INT4, (1, 64))
    assert found.matrices["a.weight_packed"].shape == (6, 128)
    assert found.surplus == {"a.weight_shape"}


def test_without_a_config_that_says_so_there_are_none() -> None:
    assert read_quantised({}, spans(b=("BF16", (4, 4)), b_scale=("F32", (1,)))) is None
    for name, dtype in (("a", "F8_E4M3"), ("a_blocks", "U8"), ("a_packed", "I32")):
        with pytest.raises(UnsupportedFamily, match="no quantization_config"):
            read_quantised({}, spans(**{name: (dtype, (4, 1, 16))}))
    with pytest.raises(UnsupportedFamily, match="says MXFP4, which does not say how"):
        read_quantised(FOUR, spans(a=("F8_E4M3", (4, 4))))
    assert read_quantised(FOUR, spans(a=("BF16", (4, 4)))) is None  # unpacked by whoever saved it


@pytest.mark.parametrize(
    ("config", "tensors", "reason"),
    [
        (EIGHT, spans(a=("F8_E4M3", (129, 128))), "a is FP8, and its scales a_scale_inv are missing"),
        (EIGHT, spans(a=("F8_E4M3", (129, 128)), a_scale_inv=("F32", (1, 1))), r"needs BF16 or F32 \[2, 1\]"),
        (EIGHT, spans(a=("F8_E4M3", (129, 128)), a_scale_inv=("U8", (2, 1))), r"a_scale_inv is U8"),
        (EIGHT, spans(a=("F8_E4M3", (129,)), a_scale_inv=("F32", (2,))), r"needs .* \[\]"),
        (EIGHT, spans(a_scale_inv=("F32", (1, 1))), "are scales of no FP8 weight"),
        (EIGHT, spans(a=("BF16", (4, 4)), a_scale_inv=("F32", (1, 1))), "are scales of no FP8 weight"),
        (FOUR, spans(a_blocks=("U8", (4, 2, 16))), "a_blocks is MXFP4, and its scales a_scales are missing"),
        (FOUR, spans(a_blocks=("U8", (4, 2, 16)), a_scales=("U8", (4, 3))), r"needs U8 \[4, 2\]"),
        (FOUR, spans(a_blocks=("U8", (4, 4, 8)), a_scales=("U8", (4, 2))), r"needs U8 \[4, 2\]"),
        (FOUR, spans(a_packed=("U8", (4, 8)), a_scale=("U8", (4, 0))), r"groups of 32"),
        (FOUR, spans(a_packed=("U8", (16,)), a_scale=("U8", (1,))), r"groups of 32"),
        (FOUR, spans(a_blocks=("U8", (4, 2, 16)), a_scales=("F32", (4, 2))), "a_scales is F32"),
        (FOUR, spans(a_scales=("U8", (4, 2))), "a_scales are scales of no MXFP4 weight"),
        (INTEGERS, spans(a_packed=("I32", (4, 8))), "a_packed is INT4, and its scales a_scale are missing"),
        (INTEGERS, spans(a_packed=("I32", (4, 12)), a_scale=("BF16", (4, 1))), "groups of 64 numbers"),
        (INTEGERS, spans(a__weight_scale=("BF16", (4, 1))), "are scales of no INT4 weight"),
    ],
)  # fmt: skip
def test_scales_that_are_missing_wrong_or_too_many_are_refused(
    config: dict[str, Any], tensors: dict[str, TensorSpan], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_quantised(config, tensors)


@pytest.mark.parametrize(("end", "reason"), [("_zero_point", "zero points"), ("_g_idx", "an order of its columns")])
def test_zero_points_and_orders_are_refused(end: str, reason: str) -> None:
    tensors = spans(a_packed=("I32", (8, 8)), a_scale=("BF16", (8, 1))) | spans(**{f"a{end}": ("I32", (1, 1))})
    with pytest.raises(UnsupportedFamily, match=reason):
        read_quantised(INTEGERS, tensors)


def test_the_other_eight_bit_float_is_refused() -> None:
    with pytest.raises(UnsupportedFamily, match="F8_E5M2"):
        read_quantised(EIGHT, spans(a=("F8_E5M2", (4, 4))))


def test_scratch_is_a_few_rows_and_the_scales() -> None:
    coding = Coding(FP8, (128, 128))
    assert scratch_bytes([(300, 200)], coding) == (65 * 200 + 3 * 2) * 4
    assert scratch_bytes([(8, 10, 200), (4, 20)], coding) == (21 * 200 + 2) * 4
    assert scratch_bytes([(300, 200)], Coding(INT4, (1, 64))) == 0
