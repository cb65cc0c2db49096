"""One safetensors file: its header, checked to the last byte. Reads no tensor data, imports no torch.

The format: 8 bytes little-endian length N, N bytes of JSON, then the data. The JSON gives each tensor a dtype, a shape
and a half-open byte range inside the data. Ranges may not overlap and must fill the data exactly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import CheckpointError
from store.identity import Identity

MAX_HEADER = 100_000_000  # the limit of the reference implementation
PREFIX = 8

# Bits an element, by the format's dtype names. Sub-byte types are packed.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """Where a tensor's bytes lie: `nbytes` from the absolute `offset` of `file`. `dtype` is the format's name: BF16."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file as it was when its header was read: its identity, and its tensors by name."""

    file: Path
    identity: Identity
    header_bytes: int  # with the length before them
    tensors: Mapping[str, TensorSpan]


def _read_header(file: Path) -> tuple[bytes, Identity]:
    """The length prefix and the JSON, and which state of which file they are of. Raises CheckpointError when they can't
    be a header, ShardChanged where somebody was writing."""
    try:
        with file.open("rb") as stream:
            identity = Identity.of(stream.fileno())
            prefix = stream.read(PREFIX)
            length = int.from_bytes(prefix, "little")
            _check_length(file, prefix, length, identity.size)
            header = prefix + stream.read(length)
            identity.check(file, stream.fileno())
            return header, identity
    except OSError as error:
        raise CheckpointError(
            f"Can't read {file}: {error.strerror}. Make the file readable, or download it again."
        ) from error


def _check_length(file: Path, prefix: bytes, length: int, size: int) -> None:
    if prefix == b"version ":
        raise CheckpointError(
            f"{file} is a Git LFS pointer, not the weights themselves. Run `git lfs pull` in its folder."
        )
    if len(prefix) == PREFIX and not 2 <= length <= MAX_HEADER:
        raise CheckpointError(
            f"{file} is no safetensors file: it claims a header of {length:,} bytes, the limit is {MAX_HEADER:,}. "
            "Download the file again."
        )
    if length + PREFIX > size or len(prefix) < PREFIX:
        raise CheckpointError(
            f"{file} is truncated: {size:,} bytes, but its header alone takes {max(length, 2) + PREFIX:,}. "
            "Download the file again."
        )


def read_shard(file: Path) -> Shard:
    """Reads the header of `file`. Raises CheckpointError unless it and the file's size agree to the byte."""
    header, identity = _read_header(file)
    spans = {
        name: _span(file, name, entry, data_start=len(header))
        for name, entry in _entries(file, header[PREFIX:]).items()
    }
    _check_extent(file, spans.values(), len(header), identity.size)
    return Shard(file, identity, len(header), spans)


def _entries(file: Path, text: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, a name twice, absurd nesting
        raise CheckpointError(f"The header of {file} is corrupt: {error}. Download the file again.") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"The header of {file} is corrupt: it is not a JSON object. Download the file again.")
    entries.pop("__metadata__", None)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is listed twice")
    return entries


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _span(file: Path, name: str, entry: Any, data_start: int) -> TensorSpan:
    match entry:
        case {"dtype": str(dtype), "shape": shape, "data_offsets": [int(begin), int(end)]} if _is_counts(shape):
            pass
        case _:
            raise CheckpointError(
                f"The header of {file} is corrupt: {name!r} needs dtype, shape and data_offsets. "
                "Download the file again."
            )
    if dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{name!r} in {file} has dtype {dtype!r}, which is not known. Known: {', '.join(DTYPE_BITS)}. "
            "Save the checkpoint in one of them, e.g. BF16."
        )
    wanted = math.prod(shape) * DTYPE_BITS[dtype] / 8
    if not 0 <= begin <= end or end - begin != wanted:
        raise CheckpointError(
            f"{name!r} in {file} is {dtype} {shape}, that is {wanted:,.0f} bytes, but its header gives it bytes "
            f"{begin:,} to {end:,}. The header is corrupt: download the file again."
        )
    return TensorSpan(name, file, data_start + begin, end - begin, dtype, tuple(shape))


def _check_extent(file: Path, spans: Iterable[TensorSpan], data_start: int, size: int) -> None:
    """Ranges lie end to end: no overlap, no gap, and the last one ends where the file does."""
    end = data_start
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset != end:
            what = "overlaps the tensor before it" if span.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{span.name!r} in {file} starts at byte {span.offset:,} and {what}, which ends at {end:,}. "
                "The header is corrupt: download the file again."
            )
        end += span.nbytes
    if size < end:
        raise CheckpointError(
            f"{file} is truncated: its header lists {end:,} bytes, the file has {size:,} ({end - size:,} missing). "
            "Download the file again."
        )
    if size > end:
        raise CheckpointError(
            f"{file} is {size:,} bytes long, but its header lists {end:,}: {size - end:,} bytes belong to nothing. "
            "Download the file again."
        )
