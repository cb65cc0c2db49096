"""Loaders of others as readers of `bench load`: run:ai's Model Streamer and fastsafetensors, each by its public calls.

Both are made for whole files and both can do with less: the streamer reads any ranges, fastsafetensors whole tensors
that a filter names. They bring bytes into memory of their own, from where these are copied into the arena, as an expert
would be into its slot. Both are optional (extra `readers`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.load_pieces import Piece, Read, by_file
from engine.card import ModelCard
from store.errors import NotFound

# Bytes of the streamer's ring: by default it takes as much as is read, and was slower (docs/performance.md).
RING = 256 << 20


@contextmanager
def runai(_: ModelCard) -> Iterator[Read]:
    """FileStreamer over the very ranges, in a ring that it fills again: direct reads, on its own number of threads."""
    module = _peer("runai_model_streamer")

    def read(wanted: Sequence[Piece]) -> None:
        files = by_file(wanted)
        lists = list(files.values())
        asked = [
            module.FileChunks(number, str(file), [one.offset for one in ones], [one.nbytes for one in ones])
            for number, (file, ones) in enumerate(files.items())
        ]
        limit = max(RING, *(piece.nbytes for piece in wanted))
        with module.FileStreamer() as streamer:
            streamer.stream_files(asked, memory_limit=limit, owned=False)
            for file, place, brought in streamer.get_chunks():  # u8 [1, nbytes]
                np.copyto(lists[file][place].into, brought[0].numpy())

    yield read


@contextmanager
def fastsafetensors(_: ModelCard) -> Iterator[Read]:
    """SafeTensorsFileLoader without a GPU: direct reads of the tensors that its filter lets through. Part of a fused
    tensor costs it the whole tensor."""
    module = _peer("fastsafetensors")

    def read(wanted: Sequence[Piece]) -> None:
        names = {piece.tensor for piece in wanted}
        with closing(module.SafeTensorsFileLoader(None, "cpu", nogds=True)) as loader:
            loader.add_filenames({0: [str(file) for file in by_file(wanted)]})
            loader.set_tensor_filter(names.__contains__)
            with closing(loader.copy_files_to_device()) as brought:
                for piece in wanted:
                    copy_rows(piece, brought.get_tensor(piece.tensor))

    yield read


PEERS: Mapping[str, Callable[[ModelCard], AbstractContextManager[Read]]] = {
    "runai": runai,
    "fastsafetensors": fastsafetensors,
}


def copy_rows(piece: Piece, tensor: Any) -> None:
    """Of a whole tensor, the rows that the piece is, into its place."""
    rows = tensor if piece.rows is None else tensor[piece.rows]
    np.copyto(piece.into, rows.contiguous().view(-1).view(torch.uint8).numpy())


def _peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise NotFound(
            f"{package} is not installed: pip install {package}, or moepager[readers] for all peers of this bench."
        ) from error
