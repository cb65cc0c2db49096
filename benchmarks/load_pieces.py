"""Parts of experts that a reader of `bench load` has to bring, and the memory where their bytes must lie afterwards."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.raw_read import Range
from engine.transfer import Bytes
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput, MoepagerError
from store.shard import TensorSpan

ALIGNMENT = 64  # of a part in the arena, as in a slot


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of one expert: where it lies in a file, which rows of which tensor it is, and where it goes."""

    file: Path
    offset: int
    nbytes: int
    tensor: str
    rows: slice | None  # None: the whole tensor
    into: Bytes  # u8 [nbytes]

    def holds(self) -> int:
        return zlib.crc32(self.into.data)


class Arena:
    """Memory for one selection, faulted in; `empty` before every read, so that nobody passes with another's bytes."""

    def __init__(self, size: int) -> None:
        self.bytes: Bytes = np.frombuffer(mmap.mmap(-1, size), np.uint8)
        self.empty()

    def empty(self) -> None:
        self.bytes.fill(0)


def arena_bytes(sizes: Iterable[int]) -> int:
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def pieces(checkpoint: CheckpointMap, ranges: Sequence[Range], arena: Arena) -> list[Piece]:
    """`ranges` are the parts, one each, and keep their order in the arena."""
    tensors: dict[Path, list[TensorSpan]] = {}
    for span in checkpoint.tensors.values():
        tensors.setdefault(span.file, []).append(span)
    made, start = [], 0
    for range_ in ranges:
        offset, nbytes = range_.offset, range_.length
        [span] = [one for one in tensors[range_.file] if one.offset <= offset < one.offset + one.nbytes]
        into = arena.bytes[start : start + nbytes]
        made.append(Piece(range_.file, offset, nbytes, span.name, _rows(span, offset, nbytes), into))
        start += arena_bytes([nbytes])
    return made


def _rows(span: TensorSpan, offset: int, nbytes: int) -> slice | None:
    if nbytes == span.nbytes:
        return None
    row = span.nbytes // span.shape[0]
    first, rest = divmod(offset - span.offset, row)
    count, over = divmod(nbytes, row)
    if rest or over:
        raise InvalidInput(f"An expert is no whole rows of {span.name}, so safe_open cannot give it.", param="reader")
    return slice(first, first + count)


Read = Callable[[Sequence[Piece]], None]


def true_sums(wanted: Sequence[Piece]) -> list[int]:
    """Of each piece, what `Piece.holds` must give: plainly read, not timed."""
    sums = []
    for piece in wanted:
        with piece.file.open("rb") as file:
            file.seek(piece.offset)
            sums.append(zlib.crc32(file.read(piece.nbytes)))
    return sums


def check(name: str, wanted: Sequence[Piece], truth: Sequence[int]) -> None:
    """Raises MoepagerError where the arena does not hold what the files do: such a reader's speed is worth nothing."""
    wrong = sum(piece.holds() != whole for piece, whole in zip(wanted, truth, strict=True))
    if wrong:
        raise MoepagerError(f"The reader {name} brought other bytes than the files hold, in {wrong} of {len(wanted)}.")


def by_file(wanted: Iterable[Piece]) -> dict[Path, list[Piece]]:
    """Files in order, and the pieces of each in the order of their places."""
    ordered: dict[Path, list[Piece]] = {}
    for piece in sorted(wanted, key=lambda piece: (str(piece.file), piece.offset)):
        ordered.setdefault(piece.file, []).append(piece)
    return ordered
