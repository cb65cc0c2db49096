"""How a checkpoint says that its weights are quantised, and which ways of that are read; the others have their reasons.

FP8 in blocks with scales (store/block_scales.py) and four-bit floats with shared exponents (store/four_bits.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from store.errors import UnsupportedFamily

USE_WIDE = (
    "Use the model's bfloat16 version, one with FP8 weights in blocks (quant_method fp8), or one in MXFP4 "
    "(quant_method mxfp4, or compressed-tensors' mxfp4-pack-quantized)."
)
FP8_BLOCKS, MXFP4 = "fp8", "mxfp4"
PACKED = "mxfp4-pack-quantized"  # compressed-tensors' name for the same numbers
PUBLISHED = "gpt_oss"  # the family that is published in MXFP4, in a layout of its own

REASONS: Mapping[str, str] = {
    "gptq": "it packs integers of a few bits along the input axis, with zero points and an order of the groups",
    "awq": "it packs four-bit integers in an interleaved order, with zero points for each group",
    "bitsandbytes": "its weights are quantised anew when they are loaded, from tables that its own kernels read",
    "compressed-tensors": f"of this family of formats, each with its own packing, {PACKED} is read",
    "fbgemm_fp8": "it has a scale for each output row, and bounds for the inputs",
}


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's quantization_config, that of a language model among several too; empty where it has none."""
    inner = config.get("text_config")
    own = inner.get("quantization_config") if isinstance(inner, Mapping) else None
    return config.get("quantization_config") or own or {}


def way_of(config: Mapping[str, Any]) -> str | None:
    """FP8_BLOCKS, MXFP4, or None for a checkpoint that is not quantised. Raises UnsupportedFamily for other ways."""
    settings = settings_of(config)
    if not settings:
        return None
    method = str(settings.get("quant_method", "unnamed"))
    if method in (FP8_BLOCKS, MXFP4):
        return method
    if method == "compressed-tensors" and _formats(settings) == {PACKED}:
        _refuse_quantised_inputs(settings)
        return MXFP4
    reason = REASONS.get(method, "moepager does not know its packing")
    raise UnsupportedFamily(f"This checkpoint is quantised by {method}, which can't be served: {reason}. {USE_WIDE}")


def in_mxfp4(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a copy of a model whose experts, and nothing else, are in MXFP4."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {
        "targets": [r"re:.*\.experts\..*"],
        "format": PACKED,
        "input_activations": None,
        "weights": weights | {"dynamic": False, "scale_dtype": "torch.uint8"},
    }
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    if config.get("model_type") == PUBLISHED:
        others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        settings = {"quant_method": MXFP4, "modules_to_not_convert": others}
    return {**config, "quantization_config": settings}


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _formats(settings: Mapping[str, Any]) -> set[str]:
    """Of each group of weights, or the one that is named for all."""
    whole = settings.get("format")
    return {str(group.get("format") or whole) for group in _groups(settings)} or {str(whole)}


def _refuse_quantised_inputs(settings: Mapping[str, Any]) -> None:
    if any(group.get("input_activations") for group in _groups(settings)):
        raise UnsupportedFamily(
            "This checkpoint quantises the inputs of its products, too (input_activations); moepager would compute "
            f"with them as they are, which is another model. {USE_WIDE}"
        )
