"""How a config says that weights are quantised: the ways that are read, and the reasons against the others."""

from __future__ import annotations

from typing import Any

import pytest

from store.errors import UnsupportedFamily
from store.quantisation import FP8_BLOCKS, MXFP4, PACKED, way_of


def packed(**group: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}, **group}}
    return {"quant_method": "compressed-tensors", "config_groups": groups}


@pytest.mark.parametrize(
    ("settings", "way"),
    [
        ({}, None),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, FP8_BLOCKS),
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
        ({"quant_method": "compressed-tensors"}, "quantised by compressed-tensors, .* mxfp4-pack-quantized is read"),
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
