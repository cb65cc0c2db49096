"""MXFP4 weights and their scales in a header: what belongs together, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from store.errors import CheckpointError, UnsupportedFamily
from store.four_bits import FourBits, matrix_shape, read_four_bits, weight_name
from store.shard import TensorSpan

MXFP4: dict[str, Any] = {"quantization_config": {"quant_method": "mxfp4"}}


def spans(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpan]:
    return {name: TensorSpan(name, Path("f"), 0, 1, dtype, shape) for name, (dtype, shape) in shapes.items()}


def test_both_layouts_have_scales_for_each_matrix() -> None:
    tensors = spans(
        a_blocks=("U8", (8, 64, 3, 16)), a_scales=("U8", (8, 64, 3)), a_bias=("BF16", (8, 64)),
        b_packed=("U8", (64, 48)), b_scale=("F8_E8M0", (64, 3)), per_expert_scale=("BF16", (8,)),
    )  # fmt: skip
    found = read_four_bits(MXFP4, tensors)
    assert found == FourBits({"a_blocks": "a_scales", "b_packed": "b_scale"})
    assert found.names == {"a_scales", "b_scale"}
    assert matrix_shape("a_blocks", "U8", (8, 64, 3, 16)) == (8, 64, 96)
    assert matrix_shape("b_packed", "U8", (64, 48)) == (64, 96)
    assert matrix_shape("b_packed", "BF16", (64, 48)) == (64, 48)


def test_a_tensor_is_called_what_its_matrix_is() -> None:
    names = ["w_blocks", "w_scales", "w_packed", "w_scale"]
    assert {weight_name(name, "U8") for name in names} == {"w"}
    assert [weight_name(name, "BF16") for name in names] == names


def test_without_a_config_that_says_so_there_are_none() -> None:
    assert read_four_bits({}, spans(b=("BF16", (4, 4)), b_scale=("F32", (1,)))) is None
    with pytest.raises(UnsupportedFamily, match="no quantization_config that says MXFP4"):
        read_four_bits({}, spans(a_blocks=("U8", (4, 1, 16))))
    assert read_four_bits(MXFP4, spans(a=("BF16", (4, 4)))) is None  # unpacked by whoever saved it


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (spans(a_blocks=("U8", (4, 2, 16))), "a_blocks is MXFP4, and its scales a_scales are missing"),
        (spans(a_blocks=("U8", (4, 2, 16)), a_scales=("U8", (4, 3))), r"needs U8 \[4, 2\]"),
        (spans(a_blocks=("U8", (4, 2, 8)), a_scales=("U8", (4, 1))), r"needs U8 \[4, 1\]"),
        (spans(a_packed=("U8", (4, 8)), a_scale=("U8", (4, 0))), r"groups of 32"),
        (spans(a_packed=("U8", (16,)), a_scale=("U8", (1,))), r"groups of 32"),
        (spans(a_blocks=("U8", (4, 2, 16)), a_scales=("F32", (4, 2))), "a_scales is F32"),
        (spans(a_scales=("U8", (4, 2))), "a_scales are scales of no MXFP4 weights"),
    ],
)
def test_scales_that_are_missing_wrong_or_too_many_are_refused(tensors: dict[str, TensorSpan], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_four_bits(MXFP4, tensors)
