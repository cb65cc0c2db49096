"""Quantised weights in a header: which two tensors are one matrix, what it is called, and what shape it has.

A matrix [..., N, K] is a tensor of numbers and one of scales, each for a block of rows and columns:
  FP8     `x` F8_E4M3 [..., N, K], and `x_scale_inv` (DeepSeek-V3) or `x_scale` (compressed-tensors)
  MXFP4   `x_blocks` u8 [..., N, K / 32, 16] and `x_scales` (gpt-oss), or `x_packed` u8 [..., N, K / 2] and `x_scale`
  INT4    `x_packed` i32 [..., N, K / 8] and `x_scale`; a number is its four bits less 8
Of two numbers in a byte the first is in its lower half. MXFP4's scales are bytes, exponents plus 127 (OCP Microscaling
Formats (MX) Specification 1.0, section 5.3); the others' are floats that values are multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from store.errors import CheckpointError, UnsupportedFamily
from store.quantisation import FP8, INT4, MXFP4, USE_WIDE, Coding, coding_of
from store.shard import TensorSpan

EIGHT_BITS, EXPONENTS = "F8_E4M3", "F8_E8M0"
BYTES = frozenset({"U8", EXPONENTS})  # what the two tensors of MXFP4 are stored as
BLOCKS, BLOCK_SCALES = "_blocks", "_scales"  # gpt-oss's
PACKED, SCALE = "_packed", "_scale"
INVERSE = "_scale_inv"  # DeepSeek-V3's name; values are multiplied by it all the same
SHAPE = "_shape"  # beside `_packed`: what its own shape says already
WIDE = frozenset({"F32", "BF16", "F16"})  # floats that scales are stored as
NUMBERS: Mapping[str, frozenset[str]] = {FP8: frozenset({EIGHT_BITS}), MXFP4: BYTES, INT4: frozenset({"I32"})}
SCALES: Mapping[str, frozenset[str]] = {FP8: frozenset({"F32", "BF16"}), MXFP4: BYTES, INT4: WIDE}
STRIP = 32  # rows of FP8 that are turned into the serving dtype at a time


@dataclass(frozen=True, slots=True)
class Matrix:
    """`numbers` and `scales` name its tensors, `name` is its own, `shape` [..., N, K]."""

    name: str
    numbers: str
    scales: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Quantised:
    """All quantised matrices of a checkpoint, by the name of either tensor; `surplus` names what says nothing new."""

    coding: Coding
    matrices: Mapping[str, Matrix]
    surplus: frozenset[str]

    @property
    def scales(self) -> frozenset[str]:
        return frozenset(matrix.scales for matrix in self.matrices.values())


def read_quantised(config: Mapping[str, Any], tensors: Mapping[str, TensorSpan]) -> Quantised | None:
    """None for a checkpoint without such weights.

    Raises UnsupportedFamily for ways that are not read, and for tensors that config.json does not explain;
    CheckpointError for scales that are missing, too many, or of another shape than their numbers ask for.
    """
    coding = coding_of(config)
    _refuse_unexplained(coding, tensors)
    if coding is None:
        return None
    numbers = [span for span in tensors.values() if _is_numbers(coding.way, span)]
    matrices = [_matrix(coding, span, tensors) for span in numbers]
    found = {name: matrix for matrix in matrices for name in (matrix.numbers, matrix.scales)}
    if orphans := sorted(name for name, span in tensors.items() if _is_scales(coding.way, span) and name not in found):
        raise CheckpointError(
            f"{orphans[0]} are scales of no {coding.way.upper()} weight ({len(orphans)} such). Download the checkpoint "
            "again."
        )
    surplus = {f"{matrix.name}{SHAPE}" for matrix in matrices} & tensors.keys() if coding.way == INT4 else set()
    return Quantised(coding, found, frozenset(surplus)) if found else None


def _refuse_unexplained(coding: Coding | None, tensors: Mapping[str, TensorSpan]) -> None:
    """Tensors that are quantised otherwise than the config says."""
    way = None if coding is None else coding.way
    eight = [span for span in tensors.values() if span.dtype.startswith("F8_") and span.dtype != EXPONENTS]
    strange = next((span for span in eight if way != FP8 or span.dtype != EIGHT_BITS), None)
    strange = strange or next((span for span in tensors.values() for other in (MXFP4, INT4)
                               if other != way and _is_numbers(other, span)), None)  # fmt: skip
    if strange is None:
        return
    told = "no quantization_config" if way is None else f"a quantization_config that says {way.upper()}"
    raise UnsupportedFamily(
        f"{strange.name} is stored as {strange.dtype}, and config.json has {told}, which does not say how. {USE_WIDE}"
    )


def _is_numbers(way: str, span: TensorSpan) -> bool:
    ends: Mapping[str, tuple[str, ...]] = {FP8: ("",), MXFP4: (BLOCKS, PACKED), INT4: (PACKED,)}
    return span.dtype in NUMBERS[way] and span.name.endswith(ends[way])


def _is_scales(way: str, span: TensorSpan) -> bool:
    """By its name and type alone; plain tensors that end in `_scale` are not asked of."""
    ends: Mapping[str, tuple[str, ...]] = {
        FP8: (INVERSE,), MXFP4: (BLOCK_SCALES, SCALE), INT4: (f"weight{SCALE}",)
    }  # fmt: skip
    return span.name.endswith(ends[way]) and (way != MXFP4 or span.dtype in BYTES)


def _matrix(coding: Coding, numbers: TensorSpan, tensors: Mapping[str, TensorSpan]) -> Matrix:
    name, ends = _named(coding.way, numbers.name)
    scales = next((tensors[name + end] for end in ends if name + end in tensors), None)
    way = coding.way.upper()
    if scales is None:
        raise CheckpointError(
            f"{numbers.name} is {way}, and its scales {name}{ends[0]} are missing. Download the weights again."
        )
    shape = _shape(coding.way, numbers)
    wanted = scales_shape(coding, shape)
    whole = numbers.shape[-1] * 2 == 32 if numbers.name.endswith(BLOCKS) else True
    if not wanted or not whole or scales.shape != wanted or scales.dtype not in SCALES[coding.way]:
        kinds = " or ".join(sorted(SCALES[coding.way] - {EXPONENTS}))
        raise CheckpointError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)}; {numbers.name} {list(numbers.shape)} in "
            f"{_blocks(coding)} needs {kinds} {list(wanted)}. They belong to different models: download both again."
        )
    _refuse_zero_points(name, tensors)
    return Matrix(name, numbers.name, scales.name, shape)


def _named(way: str, numbers: str) -> tuple[str, tuple[str, ...]]:
    """What the matrix is called, and how its scales' name may end."""
    if way == FP8:
        return numbers, (INVERSE, SCALE)
    if numbers.endswith(BLOCKS):
        return numbers.removesuffix(BLOCKS), (BLOCK_SCALES,)
    return numbers.removesuffix(PACKED), (SCALE,)


def _shape(way: str, numbers: TensorSpan) -> tuple[int, ...]:
    """[..., N, K] of the matrix."""
    shape = numbers.shape
    if way == FP8:
        return shape
    if numbers.name.endswith(BLOCKS):
        return (*shape[:-2], shape[-2] * shape[-1] * 2)
    return (*shape[:-1], shape[-1] * (8 if way == INT4 else 2))


def scales_shape(coding: Coding, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a matrix [..., N, K]; none where its rows are no whole groups."""
    if len(shape) < 2:
        return ()
    rows, columns = coding.block[0], coding.block[1] or shape[-1]
    if coding.way != FP8 and (shape[-1] % columns or not shape[-1]):
        return ()
    return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def _blocks(coding: Coding) -> str:
    rows, columns = coding.block
    if columns == 0:
        return "whole rows"
    return f"blocks of {[rows, columns]}" if rows > 1 else f"groups of {columns} numbers"


def _refuse_zero_points(name: str, tensors: Mapping[str, TensorSpan]) -> None:
    for end, what in (("_zero_point", "zero points"), ("_g_idx", "an order of its columns")):
        if name + end in tensors:
            raise UnsupportedFamily(f"{name} has {what} ({name}{end}), which are not read. {USE_WIDE}")


def scratch_bytes(shapes: Iterable[tuple[int, ...]], coding: Coding) -> int:
    """What multiplying FP8 weights of `shapes` [..., N, K] by their scales needs besides both: a few rows twice, the
    scales of a row, and those of a weight in float32. 0 for what is never multiplied so."""
    if coding.way != FP8:
        return 0
    sizes = [shape[-2:] for shape in shapes]
    strip = max(min(rows, STRIP) * columns for rows, columns in sizes)
    scales = max(prod(scales_shape(coding, size)) for size in sizes)
    return 4 * (2 * strip + max(columns for _, columns in sizes) + scales)
