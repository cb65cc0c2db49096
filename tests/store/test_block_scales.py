"""FP8 weights and their scales in a header: what belongs together, and what is refused with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from store.block_scales import BlockScales, read_block_scales, scratch_bytes
from store.errors import CheckpointError, UnsupportedFamily
from store.shard import TensorSpan

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def spans(**shapes: tuple[str, tuple[int, ...]]) -> dict[str, TensorSpan]:
    return {name: TensorSpan(name, Path("f"), 0, 1, dtype, shape) for name, (dtype, shape) in shapes.items()}


def test_each_weight_has_its_scale_and_other_tensors_have_none() -> None:
    tensors = spans(
        a=("F8_E4M3", (129, 128)), a_scale_inv=("F32", (2, 1)), b=("BF16", (4, 4)),
        c=("F8_E4M3", (8, 256, 300)), c_scale_inv=("BF16", (8, 2, 3)),
    )  # fmt: skip
    found = read_block_scales(FP8, tensors)
    assert found == BlockScales((128, 128), {"a": "a_scale_inv", "c": "c_scale_inv"})
    assert found.names == {"a_scale_inv", "c_scale_inv"}


def test_without_a_quantisation_config_there_are_no_scales_and_no_fp8() -> None:
    assert read_block_scales({}, spans(b=("BF16", (4, 4)))) is None
    with pytest.raises(UnsupportedFamily, match="no quantization_config"):
        read_block_scales({}, spans(a=("F8_E4M3", (4, 4))))


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (spans(a=("F8_E4M3", (129, 128))), "a is FP8, and its scales a_scale_inv are missing"),
        (spans(a=("F8_E4M3", (129, 128)), a_scale_inv=("F32", (1, 1))), r"needs F32 \[2, 1\]"),
        (spans(a=("F8_E4M3", (129, 128)), a_scale_inv=("U8", (2, 1))), r"a_scale_inv is U8"),
        (spans(a=("F8_E4M3", (129,)), a_scale_inv=("F32", (2,))), r"needs F32 \[\]"),
        (spans(a_scale_inv=("F32", (1, 1))), "is a scale of no FP8 weight"),
        (spans(a=("BF16", (4, 4)), a_scale_inv=("F32", (1, 1))), "is a scale of no FP8 weight"),
    ],
)
def test_scales_that_are_missing_wrong_or_too_many_are_refused(tensors: dict[str, TensorSpan], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_block_scales(FP8, tensors)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        (FP8["quantization_config"] | {"activation_scheme": "static"}, "fixes the scales of its inputs"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_eight_bit_forms_are_refused(settings: dict[str, Any], reason: str, inside: bool) -> None:
    config: dict[str, Any] = {"quantization_config": settings}
    with pytest.raises(UnsupportedFamily, match=reason):
        read_block_scales({"text_config": config} if inside else config, {})


def test_the_other_eight_bit_float_is_refused() -> None:
    with pytest.raises(UnsupportedFamily, match="F8_E5M2"):
        read_block_scales(FP8, spans(a=("F8_E5M2", (4, 4))))


def test_scratch_is_a_few_rows_and_the_scales() -> None:
    assert scratch_bytes([(300, 200)], (128, 128)) == (65 * 200 + 3 * 2) * 4
    assert scratch_bytes([(8, 10, 200), (4, 20)], (128, 128)) == (21 * 200 + 2) * 4
