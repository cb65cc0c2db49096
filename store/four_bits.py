"""MXFP4 weights: two four-bit floats in a byte, and a power of two for every 32 of a row. What belongs together.

A matrix [N, K] is two tensors of bytes: as gpt-oss stores it `x_blocks` [..., N, K / 32, 16] and `x_scales`
[..., N, K / 32], as compressed-tensors does `x_packed` [..., N, K / 2] and `x_scale` [..., N, K / 32]. The bytes are
the same: the first number in the lower half of a byte, a scale's exponent plus 127. Source: OCP Microscaling Formats
(MX) Specification 1.0, section 5.3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import CheckpointError, UnsupportedFamily
from store.quantisation import MXFP4, way_of
from store.shard import TensorSpan

GROUP = 32  # numbers that share a power of two
BYTES = frozenset({"U8", "F8_E8M0"})  # what the two tensors are stored as
SUFFIXES: Mapping[str, str] = {"_blocks": "_scales", "_packed": "_scale"}


@dataclass(frozen=True, slots=True)
class FourBits:
    """`pairs`: the scales of each matrix in four bits, by the names of both tensors."""

    pairs: Mapping[str, str]

    @property
    def names(self) -> frozenset[str]:
        """The tensors that are scales."""
        return frozenset(self.pairs.values())


def blocks_suffix(name: str, dtype: str) -> str | None:
    """The suffix that says that a tensor, or an expert's part, holds numbers in four bits; None where it does not."""
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None) if dtype in BYTES else None


def scales_suffix(name: str, dtype: str) -> str | None:
    """The same of one that holds their scales."""
    return next((suffix for suffix in SUFFIXES.values() if name.endswith(suffix)), None) if dtype in BYTES else None


def is_packed(name: str, dtype: str) -> bool:
    """Whether a tensor, or an expert's part, is one of the two of a matrix in four bits."""
    return bool(blocks_suffix(name, dtype) or scales_suffix(name, dtype))


def weight_name(name: str, dtype: str) -> str:
    """What the matrix is called, of which `name` is one of the two tensors; any other name as it is."""
    return name.removesuffix(blocks_suffix(name, dtype) or scales_suffix(name, dtype) or "")


def matrix_shape(name: str, dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., N, K] of the numbers in blocks of `shape`; of any other tensor its own."""
    suffix = blocks_suffix(name, dtype)
    if suffix is None:
        return shape
    return (*shape[:-2], shape[-2] * shape[-1] * 2) if suffix == "_blocks" else (*shape[:-1], shape[-1] * 2)


def read_four_bits(config: Mapping[str, Any], tensors: Mapping[str, TensorSpan]) -> FourBits | None:
    """None for a checkpoint without such weights.

    Raises CheckpointError for scales that are missing, too many, or of another shape than their weights ask for,
    UnsupportedFamily for tensors of bytes that config.json does not explain.
    """
    blocks = [span for span in tensors.values() if blocks_suffix(span.name, span.dtype)]
    if way_of(config) != MXFP4:
        if blocks:
            raise UnsupportedFamily(
                f"{blocks[0].name} is stored as {blocks[0].dtype}, but config.json has no quantization_config that "
                "says MXFP4. Download config.json again."
            )
        return None
    pairs = {span.name: _scales_of(span, tensors).name for span in blocks}
    if orphans := sorted(_scales(tensors.values()) - set(pairs.values())):
        raise CheckpointError(
            f"{orphans[0]} are scales of no MXFP4 weights ({len(orphans)} such). Download the checkpoint again."
        )
    return FourBits(pairs) if pairs else None


def _scales(spans: Iterable[TensorSpan]) -> set[str]:
    return {span.name for span in spans if scales_suffix(span.name, span.dtype)}


def _scales_of(blocks: TensorSpan, tensors: Mapping[str, TensorSpan]) -> TensorSpan:
    suffix = blocks_suffix(blocks.name, blocks.dtype)
    assert suffix is not None, blocks.name
    name = blocks.name.removesuffix(suffix) + SUFFIXES[suffix]
    scales = tensors.get(name)
    if scales is None:
        raise CheckpointError(f"{blocks.name} is MXFP4, and its scales {name} are missing. Download the weights again.")
    wanted = matrix_shape(blocks.name, blocks.dtype, blocks.shape)
    groups = (*wanted[:-1], wanted[-1] // GROUP)
    whole = len(blocks.shape) > 1 and wanted[-1] % GROUP == 0 and (suffix != "_blocks" or blocks.shape[-1] * 2 == GROUP)
    if not whole or scales.shape != groups or scales.dtype not in BYTES:
        raise CheckpointError(
            f"{scales.name} is {scales.dtype} {list(scales.shape)}; {blocks.name} {list(blocks.shape)} holds groups of "
            f"{GROUP} numbers and needs U8 {list(groups)}. They belong to different models: download both again."
        )
    return scales
