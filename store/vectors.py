"""Nearest exemplars by cosine similarity: the only file that imports faiss. SQL is the truth; an index is made from it.

n queries, d width, k neighbours. The index is exact (a flat inner product over unit vectors): nothing is approximated.
Saved, it is two files beside the store: `vectors-<embedder>.faiss` and a manifest that says what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from store.catalogue import Label
from store.database import Store
from store.errors import CorruptStore, InvalidInput, MismatchError
from store.packing import exemplar_digest
from store.records import F32, Exemplar, Hit

FORMAT = 1
UNIT = 1e-3  # how far from 1 a unit vector's length may be

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a saved index was made of: `content` covers every exemplar in order, `file_hash` the saved bytes."""

    format: int
    embedder: str
    dimension: int
    count: int
    content: str
    file_hash: str


class VectorIndex:
    """Exemplar vectors of one embedder, several a task. Immutable, so any number of threads may search it."""

    def __init__(self, index: Any, labels: Sequence[Label], embedder: str | None) -> None:
        """Use `rebuild` or `load_or_rebuild`: row i of the faiss `index` is the vector of `labels[i]`."""
        self._index = index
        self._labels = labels
        self.embedder = embedder

    @classmethod
    def rebuild(cls, exemplars: Sequence[Exemplar]) -> VectorIndex:
        """Raises MismatchError where the exemplars are not all of one embedder and width."""
        if not exemplars:
            return cls(None, (), None)
        kinds = sorted({(exemplar.embedder, exemplar.vector.shape) for exemplar in exemplars})
        if len(kinds) > 1:
            raise MismatchError(
                f"An index holds vectors of one embedder, got {', '.join(f'{e} {list(s)}' for e, s in kinds)}. "
                "Embed every task's exemplars again with one embedder."
            )
        vectors = _checked(np.stack([exemplar.vector for exemplar in exemplars]))  # [n, d]
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        labels = [Label(exemplar.task, exemplar.text, exemplar_digest(exemplar)) for exemplar in exemplars]
        return cls(index, labels, exemplars[0].embedder)

    @classmethod
    def load_or_rebuild(cls, store: Store, embedder: str, folder: Path) -> VectorIndex:
        """The index saved in `folder` if it agrees with the store, otherwise a new one, saved there."""
        labels = store.exemplars.labels(embedder)
        if not labels:
            return cls(None, (), embedder)
        saved = _load(folder, embedder, labels)
        if saved is not None:
            return cls(saved, labels, embedder)
        fresh = cls.rebuild(store.exemplars.list(embedder=embedder))
        try:
            fresh.save(folder)
        except OSError as error:  # the index itself is fine: only the next start will be slower
            log.warning("The vector index could not be saved in %s (%s); it is rebuilt at every start.", folder, error)
        return fresh

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def dimension(self) -> int | None:
        """The width of its vectors; None while it is empty."""
        return None if self._index is None else int(self._index.d)

    def search(self, vectors: F32, k: int) -> list[list[Hit]]:
        """For each row of `vectors` f32 [n, d], at most `k` hits, the nearest first."""
        if k < 1:
            raise InvalidInput(f"A search needs at least one neighbour, got k = {k}.", param="k")
        queries = _checked(vectors)  # [n, d]
        if self._index is None:
            return [[] for _ in queries]
        if queries.shape[1] != self._index.d:
            raise MismatchError(
                f"The index holds {self.embedder} vectors of width {self._index.d}, the query has {queries.shape[1]}. "
                "Use the embedder that the exemplars were stored with, or store them again with the new one."
            )
        similarities, rows = self._index.search(queries, min(k, len(self)))  # [n, k], [n, k]
        return [self._hits(*pair) for pair in zip(similarities.tolist(), rows.tolist(), strict=True)]

    def _hits(self, similarities: Iterable[float], rows: Iterable[int]) -> list[Hit]:
        found = [(s, row) for s, row in zip(similarities, rows, strict=True) if row >= 0]  # faiss pads with row -1
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        return [Hit(self._labels[row].task, self._labels[row].text, max(-1.0, min(1.0, s))) for s, row in found]

    def check(self, exemplars: Sequence[Exemplar]) -> None:
        """Raises CorruptStore unless the index holds exactly `exemplars`, in order, vectors included."""
        if [exemplar_digest(exemplar) for exemplar in exemplars] != [label.digest for label in self._labels]:
            raise _disagrees(f"it holds {len(self)} exemplars, the store {len(exemplars)}, and they are not the same")
        if self._index is not None:
            stored = np.stack([exemplar.vector for exemplar in exemplars])  # [n, d]
            held = self._index.reconstruct_n(0, self._index.ntotal)  # [n, d]
            if held.shape != stored.shape or not np.array_equal(held, stored):
                raise _disagrees("its vectors are not those of the store")

    def save(self, folder: Path) -> None:
        """Writes index and manifest, each atomically. After a crash in between, `load_or_rebuild` rejects the pair."""
        assert self.embedder is not None, "an empty index has nothing to save"
        assert self.dimension is not None, "an empty index has nothing to save"
        index_file, manifest_file = _files(folder, self.embedder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".vectors-") as scratch:
            fresh = Path(scratch) / "index"
            faiss.write_index(self._index, str(fresh))
            manifest = Manifest(
                FORMAT, self.embedder, self.dimension, len(self), _content(self._labels), _file_hash(fresh)
            )
            _publish(fresh, index_file)
            fresh.write_text(json.dumps(asdict(manifest), indent=2))
            _publish(fresh, manifest_file)


def _checked(vectors: F32) -> F32:
    """The rows, contiguous, as faiss wants them; refused unless each has length 1."""
    rows = np.ascontiguousarray(vectors, np.float32)
    lengths = np.linalg.norm(rows, axis=1) if rows.ndim == 2 else np.empty(0)  # [n]
    if rows.ndim != 2 or not np.all(np.abs(lengths - 1) <= UNIT):
        raise InvalidInput(
            f"Vectors to index or search are rows of length 1, [n, d]; got shape {list(rows.shape)}, lengths "
            f"{lengths[:3].round(4).tolist()}. Normalise what the embedder returns."
        )
    return rows


def _files(folder: Path, embedder: str) -> tuple[Path, Path]:
    """An embedder's name may be a path or a hub id, so its hash names the files; the manifest spells it out."""
    stem = f"vectors-{hashlib.sha256(embedder.encode()).hexdigest()[:12]}"
    return folder / f"{stem}.faiss", folder / f"{stem}.json"


def _load(folder: Path, embedder: str, labels: Sequence[Label]) -> Any:
    """The saved faiss index, or None, with a warning, where it can't be used."""
    index_file, manifest_file = _files(folder, embedder)
    if not manifest_file.exists():
        return None
    try:
        manifest = Manifest(**json.loads(manifest_file.read_bytes()))
        reason = _disagreement(manifest, embedder, labels, index_file)
    except (OSError, ValueError, TypeError) as error:  # TypeError: a manifest with other fields
        reason = f"it can't be read ({error})"
    if reason is None:
        return faiss.read_index(str(index_file))
    log.warning("The saved vector index %s is made anew: %s.", index_file, reason)
    return None


def _disagreement(manifest: Manifest, embedder: str, labels: Sequence[Label], index_file: Path) -> str | None:
    """Why the saved index may not be used. Its bytes are hashed first, since faiss trusts what it reads."""
    if (manifest.format, manifest.embedder) != (FORMAT, embedder):
        return f"it is of {manifest.embedder!r} in format {manifest.format}"
    if (manifest.count, manifest.content) != (len(labels), _content(labels)):
        return "the exemplars have changed"
    if _file_hash(index_file) != manifest.file_hash:
        return "its file is damaged"
    return None


def _disagrees(how: str) -> CorruptStore:
    return CorruptStore(
        f"The vector index disagrees with the store: {how}. Restart the service: it rebuilds the index."
    )


def _content(labels: Iterable[Label]) -> str:
    return hashlib.sha256("".join(label.digest for label in labels).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(fresh: Path, target: Path) -> None:
    """Moves a finished file into place once its bytes are on the disk."""
    with fresh.open("rb") as stream:
        os.fsync(stream.fileno())
    fresh.replace(target)
