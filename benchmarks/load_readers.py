"""Ways to bring the same byte ranges of safetensors files into the same places of memory that was touched before.

Each is given the parts of a selection and one arena; afterwards the arena must hold the same bytes, whoever read them.
Those here work on as many threads as the engine's own reader has, each thread taking the next part of one queue;
loaders of others (benchmarks/load_peers.py) have their own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from benchmarks.load_peers import PEERS
from benchmarks.load_pieces import Piece, Read, by_file
from engine.card import ModelCard
from engine.plan import READER_THREADS, reader_bytes
from engine.reader import Reader
from engine.transfer import Extent
from store.errors import MoepagerError


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
            files = {file: stack.enter_context(file.open("rb", buffering=0)).fileno() for file in by_file(wanted)}
            _share(partial(_pread, files), wanted)

    yield read


@contextmanager
def mapped(_: ModelCard) -> Iterator[Read]:
    """The files mapped, the parts copied out: the kernel reads as pages are touched."""

    def read(wanted: Sequence[Piece]) -> None:
        maps = {file: np.memmap(file, np.uint8, "r") for file in by_file(wanted)}
        _share(
            lambda piece: np.copyto(piece.into, maps[piece.file][piece.offset : piece.offset + piece.nbytes]), wanted
        )

    yield read


@contextmanager
def safetensors(_: ModelCard) -> Iterator[Read]:
    """safe_open's tensors, copied into the arena; a part of a fused tensor is taken as a slice of it."""

    def read(wanted: Sequence[Piece]) -> None:
        with ExitStack() as stack:
            files = {file: stack.enter_context(safe_open(file, framework="pt")) for file in by_file(wanted)}
            _share(lambda piece: _copy_tensor(files[piece.file], piece), wanted)

    yield read


READERS: Mapping[str, Callable[[ModelCard], AbstractContextManager[Read]]] = {
    "direct": direct,
    "safetensors": safetensors,
    "mmap": mapped,
    "pread": pread,
    **PEERS,
}


def _share(one: Callable[[Piece], None], wanted: Sequence[Piece]) -> None:
    """In the order of the files, as the engine's reader goes."""
    with ThreadPoolExecutor(READER_THREADS) as pool:
        list(pool.map(one, [piece for pieces in by_file(wanted).values() for piece in pieces]))


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
