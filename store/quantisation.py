"""How a checkpoint says that its weights are quantised, and which ways of that are read; the others have their reasons.

Eight-bit floats, integers of four bits and four-bit floats, each with scales that some of them share. Which tensors
hold them is store/quantised.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from store.errors import UnsupportedFamily

FP8, MXFP4, INT4 = "fp8", "mxfp4", "int4"


class Way(StrEnum):
    """The three, as an option names them."""

    MXFP4 = MXFP4
    INT4 = INT4
    FP8 = FP8


WHOLE_ROW = 0  # in place of the number of columns that share a scale
GROUP = 32  # numbers of MXFP4 that share a power of two; integers' groups are a multiple of it
BLOCK = (128, 128)  # of eight-bit floats, as DeepSeek-V3 has them
PUBLISHED = "gpt_oss"  # the family that is published in MXFP4, in a layout of its own

USE_WIDE = (
    "Use the model's bfloat16 version, one with FP8 weights in blocks (quant_method fp8), one in MXFP4 (quant_method "
    "mxfp4), or compressed-tensors' float-quantized, pack-quantized with four bits, or mxfp4-pack-quantized."
)
COMPRESSED = "compressed-tensors"
FORMATS: Mapping[str, str] = {  # of compressed-tensors
    "mxfp4-pack-quantized": MXFP4,
    "pack-quantized": INT4,
    "float-quantized": FP8,
}
NAMES: Mapping[str, str] = {way: name for name, way in FORMATS.items()}

REASONS: Mapping[str, str] = {
    "gptq": "it packs integers along the input axis, with zero points and an order of the groups; `moepager convert` "
    "writes a copy that is served where it has four bits, symmetric and in order",
    "awq": "it packs four-bit integers in an interleaved order, with zero points for each group",
    "bitsandbytes": "its weights are quantised anew when they are loaded, from tables that its own kernels read",
    COMPRESSED: f"of this family of formats, each with its own packing, {', '.join(FORMATS)} are read",
    "fbgemm_fp8": "it has a scale for each output row, and bounds for the inputs",
}


@dataclass(frozen=True, slots=True)
class Coding:
    """`way` is FP8, MXFP4 or INT4; `block` the rows and columns of a matrix that share a scale."""

    way: str
    block: tuple[int, int]


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config's quantization_config, that of a language model among several too; empty where it has none."""
    inner = config.get("text_config")
    own = inner.get("quantization_config") if isinstance(inner, Mapping) else None
    return config.get("quantization_config") or own or {}


def coding_of(config: Mapping[str, Any]) -> Coding | None:
    """None for a checkpoint that is not quantised. Raises UnsupportedFamily for ways that are not read."""
    settings = settings_of(config)
    if not settings:
        return None
    method = str(settings.get("quant_method", "unnamed"))
    if method == FP8:
        return Coding(FP8, _block(settings))
    if method == MXFP4:
        return Coding(MXFP4, (1, GROUP))
    formats = _formats(settings) if method == COMPRESSED else set()
    if len(formats) == 1 and (way := FORMATS.get(next(iter(formats)))) is not None:
        return _compressed(way, settings)
    reason = REASONS.get(method, "moepager does not know its packing")
    raise UnsupportedFamily(f"This checkpoint is quantised by {method}, which can't be served: {reason}. {USE_WIDE}")


def way_of(config: Mapping[str, Any]) -> str | None:
    """FP8, MXFP4, INT4, or None for a checkpoint that is not quantised. Raises UnsupportedFamily for other ways."""
    coding = coding_of(config)
    return None if coding is None else coding.way


def with_experts_in(way: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a copy of a model whose experts, and nothing else, are in FP8, MXFP4 or INT4."""
    others = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    if way == MXFP4 and config.get("model_type") == PUBLISHED:
        settings: dict[str, Any] = {"quant_method": MXFP4, "modules_to_not_convert": others}
    elif way == FP8:
        settings = {
            "quant_method": FP8, "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK),
            "modules_to_not_convert": [*others, "model.layers.*.mlp.gate"],
        }  # fmt: skip
    else:
        settings = _compressed_settings(way)
    return {**config, "quantization_config": settings}


def packed_in_integers(config: Mapping[str, Any], group: int, plain: Sequence[str]) -> dict[str, Any]:
    """The config of a copy all of whose linear layers but those named `plain` are in INT4, `group` columns to a scale
    (WHOLE_ROW: a row), as compressed-tensors has it."""
    shared = {"strategy": "channel"} if group == WHOLE_ROW else {"strategy": "group", "group_size": group}
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "dynamic": False} | shared
    settings = {
        "quant_method": COMPRESSED,
        "format": NAMES[INT4],
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
        "ignore": list(plain),
    }
    kept = {name: value for name, value in config.items() if name != "quantization_config"}
    inner = kept.get("text_config")
    if isinstance(inner, Mapping):
        kept["text_config"] = {name: value for name, value in inner.items() if name != "quantization_config"}
    return {**kept, "quantization_config": settings}


def _compressed_settings(way: str) -> dict[str, Any]:
    kind = {"type": "float", "scale_dtype": "torch.uint8"} if way == MXFP4 else {"type": "int"}
    weights = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True, "dynamic": False} | kind
    targets = [r"re:.*\.experts\..*"]
    group = {"targets": targets, "format": NAMES[way], "input_activations": None, "weights": weights}
    return {
        "quant_method": COMPRESSED,
        "format": NAMES[way],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Of DeepSeek-V3's layout."""
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UnsupportedFamily(
            f"This FP8 checkpoint has weight_block_size {block!r}; blocks of two whole numbers, such as {list(BLOCK)}, "
            f"are read. {USE_WIDE}"
        )
    if (scheme := settings.get("activation_scheme", "dynamic")) != "dynamic":
        raise UnsupportedFamily(f"This FP8 checkpoint fixes the scales of its inputs ({scheme}). {USE_WIDE}")
    return block[0], block[1]


def _compressed(way: str, settings: Mapping[str, Any]) -> Coding:
    """What all groups of weights say, which must be the same."""
    found = {_coding_of_group(way, group) for group in _groups(settings)}
    if way == MXFP4:
        found |= {Coding(MXFP4, (1, GROUP))}
    if len(found) != 1:
        raise UnsupportedFamily(f"This checkpoint quantises its groups of weights in {len(found)} ways. {USE_WIDE}")
    return found.pop()


def _coding_of_group(way: str, group: Mapping[str, Any]) -> Coding:
    _refuse_quantised_inputs(way, group.get("input_activations"))
    weights = group.get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    if way == MXFP4:
        return Coding(MXFP4, (1, GROUP))
    bits, symmetric = weights.get("num_bits"), weights.get("symmetric", True)
    if bits != (4 if way == INT4 else 8) or not symmetric or weights.get("actorder") in ("group", "dynamic"):
        order = weights.get("actorder") or "none"
        raise UnsupportedFamily(
            f"This checkpoint is in compressed-tensors' {NAMES[way]} with {bits!r} bits, symmetric {symmetric}, order "
            f"of the columns {order}; integers of 4 and floats of 8, without zero points and in order, are read. "
            f"{USE_WIDE}"
        )
    return Coding(way, _shared(way, weights))


def _shared(way: str, weights: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    strategy, group, block = (weights.get(name) for name in ("strategy", "group_size", "block_structure"))
    if strategy == "channel":
        return 1, WHOLE_ROW
    if way == INT4 and strategy == "group" and type(group) is int and group > 0 and group % GROUP == 0:
        return 1, group
    if way == FP8 and strategy == "block" and isinstance(block, list) and len(block) == 2:
        return int(block[0]), int(block[1])
    kinds = f"groups of a multiple of {GROUP}" if way == INT4 else "blocks"
    raise UnsupportedFamily(
        f"This checkpoint's scales are for each {strategy} ({group or block}); rows and {kinds} are read. {USE_WIDE}"
    )


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = settings.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _formats(settings: Mapping[str, Any]) -> set[str]:
    """Of each group of weights, or the one that is named for all."""
    whole = settings.get("format")
    return {str(group.get("format") or whole) for group in _groups(settings)} or {str(whole)}


def _refuse_quantised_inputs(way: str, inputs: Any) -> None:
    """FP8's inputs are rounded anew for each token: leaving that out is nearer to the model that was quantised, as with
    DeepSeek-V3's layout."""
    dynamic = isinstance(inputs, Mapping) and inputs.get("dynamic") is True
    if inputs and not (way == FP8 and dynamic):
        raise UnsupportedFamily(
            "This checkpoint quantises the inputs of its products, too (input_activations); moepager would compute "
            f"with them as they are, which is another model. {USE_WIDE}"
        )
