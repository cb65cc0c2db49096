"""FP8 weights with a scale for each block of values, as DeepSeek-V3 stores them: which scale belongs to which weight.

`x.weight` is F8_E4M3 [N, K], and its values are multiplied by `x.weight_scale_inv` [ceil(N / 128), ceil(K / 128)].
Stacked experts have both with a leading E.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import CheckpointError, UnsupportedFamily
from store.quantisation import FP8_BLOCKS, USE_WIDE, settings_of, way_of
from store.shard import TensorSpan

FP8 = "F8_E4M3"
EXPONENTS = "F8_E8M0"  # no weights: four-bit ones' scales (store/four_bits.py)
SCALE_DTYPES = frozenset({"F32", "BF16"})
SUFFIX = "_scale_inv"
BLOCK = (128, 128)
STRIP = 32  # rows that are turned into the serving dtype at a time


@dataclass(frozen=True, slots=True)
class BlockScales:
    """`pairs`: the scale tensor of each FP8 weight, by name. `block`: rows and columns that share a scale."""

    block: tuple[int, int]
    pairs: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are scales."""
        return frozenset(self.pairs.values())


def is_scale(name: str) -> bool:
    return name.endswith(SUFFIX)


def scale_name(name: str) -> str:
    """The scale of a weight, of a whole tensor's name as of an expert's projection."""
    return name + SUFFIX


def read_block_scales(config: Mapping[str, Any], tensors: Mapping[str, TensorSpan]) -> BlockScales | None:
    """None for a checkpoint without FP8 weights.

    Raises UnsupportedFamily for other eight-bit forms, CheckpointError for scales that are missing, too many, or of
    another shape than their weights ask for.
    """
    block = _block(config)
    eight_bits = [span for span in tensors.values() if span.dtype.startswith("F8_") and span.dtype != EXPONENTS]
    weights = [span for span in eight_bits if not is_scale(span.name)]
    if block is None and weights:
        raise UnsupportedFamily(
            f"{weights[0].name} is stored as {weights[0].dtype}, but config.json has no quantization_config that says "
            f"how. {USE_WIDE}"
        )
    if block is None:
        return None
    pairs = {span.name: _scale_of(span, tensors, block).name for span in weights}
    if orphans := sorted({name for name in tensors if is_scale(name)} - set(pairs.values())):
        raise CheckpointError(
            f"{orphans[0]} is a scale of no FP8 weight ({len(orphans)} such). Download the checkpoint again."
        )
    return BlockScales(block, pairs)


def _scale_of(weight: TensorSpan, tensors: Mapping[str, TensorSpan], block: tuple[int, int]) -> TensorSpan:
    if weight.dtype != FP8:
        raise UnsupportedFamily(
            f"{weight.name} is stored as {weight.dtype}; of eight bits only {FP8} is read. {USE_WIDE}"
        )
    scale = tensors.get(scale_name(weight.name))
    if scale is None:
        raise CheckpointError(
            f"{weight.name} is FP8, and its scales {scale_name(weight.name)} are missing. Download the weights again."
        )
    wanted = _scale_shape(weight.shape, block)
    if scale.shape != wanted or scale.dtype not in SCALE_DTYPES:
        raise CheckpointError(
            f"{scale.name} is {scale.dtype} {list(scale.shape)}; {weight.name} {list(weight.shape)} in blocks of "
            f"{list(block)} needs F32 {list(wanted)}. They belong to different models: download both again."
        )
    return scale


def _scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    if len(shape) < len(block):
        return ()
    return (*shape[:-2], *(-(-length // size) for length, size in zip(shape[-2:], block, strict=True)))


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block of a config that says FP8, None of one that does not."""
    if way_of(config) != FP8_BLOCKS:
        return None
    settings = settings_of(config)
    block = settings.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        raise UnsupportedFamily(
            f"This FP8 checkpoint has weight_block_size {block!r}; blocks of two whole numbers, such as {list(BLOCK)}, "
            f"are read. {USE_WIDE}"
        )
    if (scheme := settings.get("activation_scheme", "dynamic")) != "dynamic":
        raise UnsupportedFamily(f"This FP8 checkpoint fixes the scales of its inputs ({scheme}). {USE_WIDE}")
    return block[0], block[1]


def scratch_bytes(shapes: Iterable[tuple[int, ...]], block: tuple[int, int]) -> int:
    """What multiplying weights of `shapes` [..., N, K] by their scales needs besides both: a few rows twice, the scales
    of a row, and those of a weight in float32."""
    sizes = [shape[-2:] for shape in shapes]
    strip = max(min(rows, STRIP) * columns for rows, columns in sizes)
    scales = max(-(-rows // block[0]) * -(-columns // block[1]) for rows, columns in sizes)
    return 4 * (2 * strip + max(columns for _, columns in sizes) + scales)
