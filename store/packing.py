"""Arrays as bytes and back. Owns the stored formats, each with a version; nothing here is ever unpickled."""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from store.errors import CorruptStore, MismatchError
from store.records import F32, Exemplar, Selection

Arrays = Mapping[str, npt.NDArray[np.generic]]

FORMAT = 1
FORMAT_NAME = "format"
PREFIX = "array."  # keeps names apart from the format's own and from numpy's parameters
KINDS = frozenset("biuf")  # booleans, whole numbers, floats: never objects


def pack_arrays(arrays: Arrays) -> bytes:
    """One compressed .npz, names and dtypes kept. The same arrays give the same bytes."""
    kinds = {array.dtype.kind for array in arrays.values()}
    assert kinds <= KINDS, f"statistics hold numbers, got dtype kinds {kinds - KINDS}"
    buffer = io.BytesIO()
    named = {PREFIX + name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    np.savez_compressed(buffer, allow_pickle=False, **{FORMAT_NAME: np.int64(FORMAT)}, **named)
    return buffer.getvalue()


def unpack_arrays(blob: bytes, whose: str) -> dict[str, npt.NDArray[np.generic]]:
    """Raises CorruptStore for a damaged blob, MismatchError for one of a newer format. `whose` names it in messages."""
    try:
        with np.load(io.BytesIO(blob), allow_pickle=False) as stored:
            arrays = dict(stored)
    except (ValueError, TypeError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptStore(
            f"The statistics of {whose} are damaged: {error}. Delete that task and profile it again."
        ) from error
    version = int(arrays.pop(FORMAT_NAME, np.int64(0)))
    if version != FORMAT:
        raise MismatchError(
            f"The statistics of {whose} are in format {version}, this moepager reads {FORMAT}. "
            "Upgrade moepager, or profile the task again."
        )
    return {name.removeprefix(PREFIX): array for name, array in arrays.items()}


def pack_selection(selection: Selection) -> tuple[int, bytes]:
    """The width of a row in bits, and the rows."""
    width = max((ids[-1] + 1 for ids in selection.experts if ids), default=0)
    bits = np.zeros((len(selection.experts), width), np.bool_)  # [L, width]
    for layer, ids in enumerate(selection.experts):
        bits[layer, list(ids)] = True
    return width, np.packbits(bits, axis=1).tobytes()


def unpack_selection(layers: int, width: int, bitmap: bytes, whose: str) -> Selection:
    row = -(-width // 8)
    if len(bitmap) != layers * row:
        raise CorruptStore(
            f"The selection {whose} is damaged: {layers} rows of {width} bits take {layers * row} bytes, "
            f"{len(bitmap)} are stored. Delete its task and profile it again."
        )
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8).reshape(layers, row), axis=1, count=width)  # [L, width]
    return Selection(tuple(tuple(np.flatnonzero(line).tolist()) for line in bits))


def pack_vector(vector: F32) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()


def unpack_vector(blob: bytes, whose: str) -> F32:
    if not blob or len(blob) % 4:
        raise CorruptStore(f"The vector of {whose} is damaged: {len(blob)} bytes. Store that task's exemplars again.")
    return np.frombuffer(blob, "<f4").astype(np.float32)  # [d]


def exemplar_digest(exemplar: Exemplar) -> str:
    """Sha256 of all that a search result depends on; lengths keep the fields apart."""
    digest = hashlib.sha256()
    for field in (
        exemplar.embedder.encode(),
        exemplar.task.encode(),
        exemplar.text.encode(),
        pack_vector(exemplar.vector),
    ):
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.hexdigest()
