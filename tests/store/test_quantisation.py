"""How a config says that weights are quantised: the ways that are read, and the reasons against the others."""

from __future__ import annotations

from typing import Any

import pytest

from store.errors import UnsupportedFamily
from store.quantisation import FP8, INT4, MXFP4, NAMES, WHOLE_ROW, Coding, coding_of, way_of

PACKED = NAMES[MXFP4]


def packed(**group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}, **group}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8),
        ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, MXFP4),
        (packed() | {"format": PACKED}, MXFP4),
        (packed(format=PACKED), MXFP4),
        (packed(format=PACKED, input_activations=None), MXFP4),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_a_way_is_known_by_its_name(settings: dict[str, Any], way: str | None, inside: bool) -> None:
    config: dict[str, Any] = {"quantization_config": settings}
    assert way_of({"text_config": config} if inside else config) == way
    assert way_of({}) is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised by gptq, .* zero points"),
        ({"quant_method": "awq"}, "quantised by awq, .* interleaved"),
        (
            {"quant_method": "compressed-tensors"},
            "quantised by compressed-tensors, .* float-quantized are read",
        ),
        (packed(format="nvfp4-pack-quantized"), "quantised by compressed-tensors"),
        (packed(format=PACKED, input_activations={"num_bits": 4}), "quantises the inputs of its products"),
        ({"quant_method": "strange"}, "quantised by strange, .* does not know"),
        ({"bits": 4}, "quantised by unnamed"),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_other_ways_are_refused_by_name(settings: dict[str, Any], reason: str, inside: bool) -> None:
    config: dict[str, Any] = {"quantization_config": settings}
    with pytest.raises(UnsupportedFamily, match=reason):
        way_of({"text_config": config} if inside else config)


def test_groups_of_several_formats_are_refused() -> None:
    settings = packed(format=PACKED)
    settings["config_groups"]["group_1"] = {"format": "float-quantized"}
    with pytest.raises(UnsupportedFamily, match="quantised by compressed-tensors"):
        way_of({"quantization_config": settings})


def group(name: str, inputs: Any = None, **weights: Any) -> dict[str, Any]:
    held = {"group_0": {"weights": weights, "format": name, "input_activations": inputs}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": held}}


@pytest.mark.parametrize(
    ("config", "coding"),
    [
        (group("pack-quantized", num_bits=4, strategy="group", group_size=32), Coding(INT4, (1, 32))),
        (group("pack-quantized", num_bits=4, strategy="group", group_size=128, actorder="static"),
         Coding(INT4, (1, 128))),
        (group("pack-quantized", num_bits=4, strategy="channel"), Coding(INT4, (1, WHOLE_ROW))),
        (group("float-quantized", {"dynamic": True}, num_bits=8, strategy="channel"), Coding(FP8, (1, WHOLE_ROW))),
        (group("float-quantized", num_bits=8, strategy="block", block_structure=[128, 128]), Coding(FP8, (128, 128))),
    ],
)  # fmt: skip
def test_what_shares_a_scale_is_read_from_the_groups(config: dict[str, Any], coding: Coding) -> None:
    assert coding_of(config) == coding


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (group("pack-quantized", num_bits=8, strategy="channel"), "with 8 bits"),
        (group("pack-quantized", num_bits=4, strategy="channel", symmetric=False), "symmetric False"),
        (group("pack-quantized", num_bits=4, strategy="group", group_size=32, actorder="group"), "columns group"),
        (group("pack-quantized", num_bits=4, strategy="group", group_size=16), "multiple of 32"),
        (group("float-quantized", num_bits=8, strategy="tensor"), "for each tensor"),
        (group("float-quantized", {"dynamic": False}, num_bits=8, strategy="channel"), "quantises the inputs"),
    ],
)
def test_other_groups_are_refused_with_what_they_are(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedFamily, match=reason):
        coding_of(config)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size \[128, 0\]"),
        ({"quant_method": "fp8", "weight_block_size": [8, 8], "activation_scheme": "static"}, "scales of its inputs"),
    ],
)
def test_eight_bits_without_blocks_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedFamily, match=reason):
        coding_of({"text_config": {"quantization_config": settings}})
