"""Ways to bring the same byte ranges of safetensors files into the same places of memory that was touched before.

Each is given the parts of a selection and one arena; afterwards the arena must hold the same bytes, whoever read them.
All work on as many threads as the engine's own reader has, each thread taking the next part of one queue.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.raw_read import Range
from engine.card import ModelCard
from engine.plan import READER_THREADS, reader_bytes
from engine.reader import Reader
from engine.transfer import Bytes, Extent
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


@contextmanager
def direct(card: ModelCard) -> Iterator[Read]:
    """The engine's reader: direct, sorted, neighbours joined, copied out of aligned buffers."""
    with Reader(reader_bytes(card), READER_THREADS) as reader:

        def read(wanted: Sequence[Piece]) -> None:
            reader.read([Extent(piece.file, piece.offset, piece.nbytes, piece.into) for piece in wanted])

        yield read


@contextmanager
def pread(_: ModelCard) -> Iterator[Read]:
    """preadv through the page cache, straight into the arena."""

    def read(wanted: Sequence[Piece]) -> None:
        with ExitStack() as stack:
            files = {file: stack.enter_context(file.open("rb", buffering=0)).fileno() for file in _files(wanted)}
            _share(partial(_pread, files), wanted)

    yield read


@contextmanager
def mapped(_: ModelCard) -> Iterator[Read]:
    """The files mapped, the parts copied out: the kernel reads as pages are touched."""

    def read(wanted: Sequence[Piece]) -> None:
        maps = {file: np.memmap(file, np.uint8, "r") for file in _files(wanted)}
        _share(
            lambda piece: np.copyto(piece.into, maps[piece.file][piece.offset : piece.offset + piece.nbytes]), wanted
        )

    yield read


@contextmanager
def safetensors(_: ModelCard) -> Iterator[Read]:
    """safe_open's tensors, copied into the arena; a part of a fused tensor is taken as a slice of it."""

    def read(wanted: Sequence[Piece]) -> None:
        with ExitStack() as stack:
            files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in _files(wanted)}
            _share(lambda piece: _copy_tensor(files[piece.file], piece), wanted)

    yield read


OURS: Mapping[str, Callable[[ModelCard], AbstractContextManager[Read]]] = {
    "direct": direct,
    "safetensors": safetensors,
    "mmap": mapped,
    "pread": pread,
}


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


def _files(wanted: Sequence[Piece]) -> list[Path]:
    return sorted({piece.file for piece in wanted})


def _share(one: Callable[[Piece], None], wanted: Sequence[Piece]) -> None:
    """In the order of the files, as the engine's reader goes."""
    ordered = sorted(wanted, key=lambda piece: (str(piece.file), piece.offset))
    with ThreadPoolExecutor(READER_THREADS) as pool:
        list(pool.map(one, ordered))


def _pread(files: Mapping[Path, int], piece: Piece) -> None:
    got = 0
    while got < piece.nbytes:
        n = os.preadv(files[piece.file], [piece.into[got:]], piece.offset + got)  # type: ignore[list-item]
        if n == 0:
            raise MoepagerError(f"{piece.file} ends at {piece.offset + got}; {piece.nbytes - got} bytes are missing.")
        got += n


def _copy_tensor(file: Any, piece: Piece) -> None:
    tensor = file.get_tensor(piece.tensor) if piece.rows is None else file.get_slice(piece.tensor)[piece.rows]
    np.copyto(piece.into, tensor.contiguous().view(-1).view(torch.uint8).numpy())
