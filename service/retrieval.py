"""Which task a query belongs to: embed, search, rank, compare with a threshold. Knows no profile, no budget, no HTTP.

The score of a task is the mean similarity of its best `top` exemplars to the query. Below the threshold the answer is
"no task". The threshold is calibrated on the exemplars themselves, each scored as if it were a query (leave one out).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from service.receipt import Reason
from store.errors import CorruptStore, InvalidInput
from store.records import F64, Exemplar, Hit

if TYPE_CHECKING:  # both are heavy to import, and all but Retriever is arithmetic
    from engine.embedder import Embedder
    from store.vectors import VectorIndex

NEIGHBOURS = 64  # exemplars looked at for a query
TOP = 1  # exemplars of a task that make its score
NO_EVIDENCE = 0.5  # the threshold where exemplars can't calibrate one: a single exemplar in all


@dataclass(frozen=True, slots=True)
class Ranked:
    task: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """A threshold and the numbers behind it: the share of exemplars that it would accept for their own task, the share
    that it would reject where their own task did not exist, and how well similarity tells the two apart (AUROC)."""

    threshold: float
    accepted: float | None
    rejected: float | None
    auroc: float | None
    exemplars: int


@dataclass(frozen=True, slots=True)
class Retrieval:
    """What was found for one query. `task` is None where nothing was near enough."""

    task: str | None
    nearest: str | None
    similarity: float | None
    threshold: float
    reason: Reason
    ranked: tuple[Ranked, ...]


class Retriever:
    """Decides the task of a query among `tasks`; the index may hold others. Safe to call from several threads."""

    def __init__(
        self, embedder: Embedder, index: VectorIndex, threshold: float, tasks: Collection[str], strangers: int = 0
    ) -> None:
        """`strangers` counts the index's exemplars of other tasks, which are looked past."""
        self.embedder = embedder
        self.index = index
        self.threshold = threshold
        self._tasks = frozenset(tasks)
        self._neighbours = NEIGHBOURS + strangers

    def decide(self, query: str) -> Retrieval:
        if not query.strip():
            raise InvalidInput("An empty query belongs to no task. Write the query, or name the task.", param="query")
        [hits] = self.index.search(self.embedder.embed([query]), self._neighbours)
        return decide(rank([hit for hit in hits if hit.task in self._tasks]), self.threshold)


def rank(hits: Sequence[Hit], top: int = TOP) -> tuple[Ranked, ...]:
    """Tasks by the mean similarity of their best `top` hits, best first; ties by name."""
    similarities: dict[str, list[float]] = {}
    for hit in hits:
        similarities.setdefault(hit.task, []).append(hit.similarity)
    ranked = [Ranked(task, task_score(found, top)) for task, found in similarities.items()]
    return tuple(sorted(ranked, key=lambda r: (-r.similarity, r.task)))


def task_score(similarities: Sequence[float], top: int = TOP) -> float:
    best = sorted(similarities, reverse=True)[:top]
    return sum(best) / len(best)


def decide(ranked: Sequence[Ranked], threshold: float) -> Retrieval:
    if not ranked:
        return Retrieval(None, None, None, threshold, "no-tasks", ())
    best = ranked[0]
    near = best.similarity >= threshold
    reason: Reason = "retrieved" if near else "below-threshold"
    return Retrieval(best.task if near else None, best.task, best.similarity, threshold, reason, tuple(ranked))


def pinned(task: str, threshold: float) -> Retrieval:
    """The request named its task: nothing was searched."""
    return Retrieval(task, None, None, threshold, "pinned", ())


def calibrate_threshold(exemplars: Sequence[Exemplar], top: int = TOP) -> Calibration:
    """The threshold that best parts queries of known tasks from queries of unknown ones.

    Each exemplar is scored twice: against the others of its own task (it should be accepted), and, as if its task did
    not exist, against all other tasks (it should be rejected). The threshold maximises the mean of both shares.
    """
    inside, across = _leave_one_out(exemplars, top)
    threshold = _best_threshold(inside, across)
    return Calibration(
        threshold=threshold,
        accepted=float((inside >= threshold).mean()) if inside.size else None,
        rejected=float((across < threshold).mean()) if across.size else None,
        auroc=auroc(inside, across),
        exemplars=len(exemplars),
    )


def _leave_one_out(exemplars: Sequence[Exemplar], top: int) -> tuple[F64, F64]:
    """Scores of exemplars in their own task without themselves, and in the best other task."""
    # n exemplars, d dimensions, m exemplars of one task, t tasks
    _check_vectors(exemplars)
    if not exemplars:
        return np.zeros(0), np.zeros(0)
    vectors = np.stack([e.vector for e in exemplars]).astype(np.float64)  # [n, d]
    names, task = np.unique([e.task for e in exemplars], return_inverse=True)  # [t], [n]
    scores = np.stack(
        [_scores_in(vectors, np.flatnonzero(task == t), top) for t in range(len(names))], axis=1
    )  # [n, t]
    own = np.arange(len(exemplars)), task
    inside = scores[own].copy()  # [n]
    scores[own] = -np.inf
    across = scores.max(axis=1)  # [n]
    return inside[np.isfinite(inside)], across[np.isfinite(across)]


def _scores_in(vectors: F64, rows: npt.NDArray[np.intp], top: int) -> F64:
    """Every exemplar's score in the task of `rows`, itself left out; -inf where nothing is left."""
    similarities = vectors @ vectors[rows].T  # [n, m]
    similarities[rows, np.arange(len(rows))] = -np.inf
    best = np.sort(similarities, axis=1)[:, ::-1][:, :top]  # [n, <= top]
    count = np.isfinite(best).sum(axis=1)  # [n]
    total = np.where(np.isfinite(best), best, 0.0).sum(axis=1)  # [n]
    return np.where(count > 0, total / np.maximum(count, 1), -np.inf)  # [n]


def _check_vectors(exemplars: Sequence[Exemplar]) -> None:
    for exemplar in exemplars:
        if not np.isfinite(exemplar.vector).all():
            raise CorruptStore(
                f"An exemplar of task {exemplar.task!r} has a vector with NaN or infinity: {exemplar.text[:60]!r}. "
                "Profile the task again."
            )


def _best_threshold(inside: F64, across: F64) -> float:
    if not inside.size and not across.size:
        return NO_EVIDENCE
    if not across.size:  # one task only: what nearly all of its exemplars reach
        return float(np.quantile(inside, 0.05))
    if not inside.size:  # one exemplar a task: half-way between the nearest stranger and a perfect match
        return float((across.max() + 1.0) / 2)
    values = np.unique(np.concatenate([inside, across]))
    candidates = np.concatenate([[values[0]], (values[1:] + values[:-1]) / 2])
    accepted = 1 - np.searchsorted(np.sort(inside), candidates, side="left") / inside.size
    rejected = np.searchsorted(np.sort(across), candidates, side="left") / across.size
    quality = accepted + rejected
    best = candidates[np.isclose(quality, quality.max())]
    return float(best[len(best) // 2])


def auroc(positives: F64, negatives: F64) -> float | None:
    """The chance that a positive scores above a negative, ties counting half. None where one side is empty."""
    if not positives.size or not negatives.size:
        return None
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left")
    ties = np.searchsorted(ordered, positives, side="right") - below
    return float((below + ties / 2).sum() / (positives.size * negatives.size))
