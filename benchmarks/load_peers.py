"""Published readers of safetensors files, for `bench load`: what they bring is copied into the same arena as by others.

Both are optional (`moepager[readers]`) and run as their own documentation has it, with their own defaults. Their own
memory comes on top of the arena: they fill buffers of their own, which nobody else can choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.load_readers import Piece, Read
from engine.card import ModelCard
from engine.plan import READER_THREADS
from store.errors import NotFound


@contextmanager
def runai(_: ModelCard) -> Iterator[Read]:
    """run:ai's Model Streamer: byte ranges of files, read in the background, given in any order."""
    try:
        from runai_model_streamer import FileChunks, FileStreamer  # noqa: PLC0415 - an optional peer
    except ImportError as error:
        raise _absent("run:ai's Model Streamer", "runai-model-streamer") from error

    def read(wanted: Sequence[Piece]) -> None:
        groups = list(_by_file(wanted).items())
        asked = [
            FileChunks(number, str(file), [one.offset for one in pieces], [one.nbytes for one in pieces])
            for number, (file, pieces) in enumerate(groups)
        ]
        with FileStreamer() as streamer:
            streamer.stream_files(asked)
            for number, place, tensor in streamer.get_chunks():
                np.copyto(groups[number][1][place].into, tensor.numpy().reshape(-1))

    yield read


@contextmanager
def fastsafetensors(_: ModelCard) -> Iterator[Read]:
    """fastsafetensors without GPUDirect, the tensors that are wanted alone; of a fused tensor it reads all."""
    try:
        from fastsafetensors import SafeTensorsFileLoader  # noqa: PLC0415 - an optional peer
    except ImportError as error:
        raise _absent("fastsafetensors", "fastsafetensors") from error

    def read(wanted: Sequence[Piece]) -> None:
        names = {piece.tensor for piece in wanted}
        with closing(SafeTensorsFileLoader(None, "cpu", nogds=True, max_threads=READER_THREADS)) as loader:
            loader.add_filenames({0: [str(file) for file in _by_file(wanted)]})
            loader.set_tensor_filter(names.__contains__)
            with closing(loader.copy_files_to_device()) as buffers:
                for piece in wanted:
                    _copy(buffers.get_tensor(piece.tensor), piece)

    yield read


def _copy(tensor: Any, piece: Piece) -> None:
    rows = tensor if piece.rows is None else tensor[piece.rows]
    np.copyto(piece.into, rows.contiguous().view(-1).view(torch.uint8).numpy())


def _by_file(wanted: Sequence[Piece]) -> dict[Path, list[Piece]]:
    """In the order of the files."""
    found: dict[Path, list[Piece]] = {}
    for piece in sorted(wanted, key=lambda piece: (str(piece.file), piece.offset)):
        found.setdefault(piece.file, []).append(piece)
    return found


def _absent(name: str, package: str) -> NotFound:
    return NotFound(
        f"{name} is not installed: pip install {package}, or moepager[readers] for all peers of this bench."
    )
