"""How well queries find their task, how well strangers are told apart, and how long that takes.

Two retrievers over the same exemplars: the sentence embedding (cosine), and PreMoe's own signature, the mean top-1
gate logits of the first MoE layer (L2). A task's score is the service's own for the embedding, and that of the nearest
exemplar for the signature, as in the paper. For abstention every task is
left out in turn: its queries are then strangers, and the AUROC says how well the best score tells them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np

from benchmarks.retrieval_data import RetrievalSet
from service.retrieval import auroc, calibrate_threshold, task_scores
from store.records import F32, Exemplar
from store.vectors import VectorIndex

Vectorise = Callable[[Sequence[str]], F32]


@dataclass(frozen=True, slots=True)
class Found:
    """`accuracy` without a threshold; `kept` and `abstained` at the threshold calibrated on the exemplars alone."""

    set: str
    retriever: str
    tasks: int
    queries: int
    accuracy: float
    abstain_auroc: float
    kept: float | None  # queries that found their own task above the threshold
    abstained: float | None  # queries of left-out tasks that fell below it


def measure(data: RetrievalSet, retriever: str, vectorise: Vectorise, *, cosine: bool) -> Found:
    exemplars, queries = vectorise(data.exemplars.texts), vectorise(data.queries.texts)  # [n, d], [m, d]
    scores = scores_by_task(queries, exemplars, np.array(data.exemplars.tasks), cosine=cosine)  # [m, tasks]
    own = np.arange(len(queries)), np.array(data.queries.tasks)
    right = scores.argmax(axis=1) == own[1]  # [m]
    known = scores.max(axis=1)  # [m]
    without = scores.copy()
    without[own] = -np.inf
    strangers = without.max(axis=1)  # [m]
    threshold = _threshold(data, exemplars) if cosine else None
    return Found(
        set=data.name,
        retriever=retriever,
        tasks=scores.shape[1],
        queries=len(queries),
        accuracy=float(right.mean()),
        abstain_auroc=auroc(known, strangers) or 0.0,
        kept=None if threshold is None else float((right & (known >= threshold)).mean()),
        abstained=None if threshold is None else float((strangers < threshold).mean()),
    )


def scores_by_task(queries: F32, exemplars: F32, tasks: np.ndarray, *, cosine: bool) -> np.ndarray:
    """Each query's score in each task: the service's, or negative squared L2 to the nearest. f64 [m, tasks]."""
    q, x = queries.astype(np.float64), exemplars.astype(np.float64)
    of_task = [x[tasks == task] for task in range(tasks.max() + 1)]  # [n_t, d] each
    if cosine:
        columns = [task_scores(q @ one.T, np.atleast_1d(np.linalg.norm(one.sum(0)))) for one in of_task]
    else:
        columns = [(2 * q @ one.T - (one**2).sum(1)).max(axis=1) - (q**2).sum(1) for one in of_task]
    return np.stack(columns, axis=1)


def _threshold(data: RetrievalSet, vectors: F32) -> float:
    labelled = zip(data.exemplars.texts, data.exemplars.tasks, vectors, strict=True)
    return calibrate_threshold([Exemplar(str(task), text, vector) for text, task, vector in labelled]).threshold


def embed_ms_p50(vectorise: Vectorise, texts: Sequence[str], runs: int = 50) -> float:
    """Median milliseconds of one query at a time, after a warm-up."""
    vectorise(texts[:1])
    return median(_milliseconds(partial(vectorise, [text])) for text in texts[:runs])


def search_ms_p50(sizes: Sequence[int], dimension: int, runs: int = 21) -> dict[int, float]:
    """Median milliseconds of one exact search among that many random unit vectors."""
    rng = np.random.default_rng(0)
    found = {}
    for size in sizes:
        vectors = rng.standard_normal((size, dimension), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        index = VectorIndex.rebuild([Exemplar(f"task {n % 100}", str(n), vector) for n, vector in enumerate(vectors)])
        queries = vectors[rng.integers(0, size, runs)]  # [runs, d]
        found[size] = median(_milliseconds(partial(index.search, query[None], 64)) for query in queries)
    return found


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000
