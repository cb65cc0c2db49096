"""Which task a query belongs to: embed, search, rank, compare with a threshold. Knows no profile, no budget, no HTTP.

The score of a task is half the mean similarity of its `TOP` nearest exemplars and half the cosine to the mean of all of
them (`task_scores`). Below the threshold the answer is "no task". The threshold is calibrated on the exemplars
themselves, each scored as if it were a query (leave one out).

n queries, m exemplars of one task, t tasks, d dimensions.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from service.receipt import Reason
from store.errors import CorruptStore, InvalidInput
from store.records import F32, F64, Exemplar, Hit

if TYPE_CHECKING:  # both are heavy to import, and all but Retriever is arithmetic
    from engine.embedder import Embedder
    from store.vectors import VectorIndex

MOST_READ = 8192  # characters of a query that are embedded: what it is about shows long before, and time is theirs
NEIGHBOURS = 64  # exemplars that the index is asked for; their tasks are the first candidates
TOP = 3  # nearest exemplars of a task whose mean makes half of its score
ROUNDING = 1e-6  # what f32 may be off by where a bound is compared
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
    """Decides the task of a query among those of `exemplars`; the index may hold others, which are looked past.

    Safe to call from several threads.
    """

    def __init__(self, embedder: Embedder, index: VectorIndex, threshold: float, exemplars: Sequence[Exemplar]) -> None:
        self.embedder = embedder
        self.index = index
        self.threshold = threshold
        self._tasks = tuple(sorted({e.task for e in exemplars}))
        self._vectors = [
            np.stack([e.vector for e in exemplars if e.task == task]) for task in self._tasks
        ]  # t of [m, d]
        self._sums = [vectors.sum(axis=0, dtype=np.float64) for vectors in self._vectors]  # t of [d]
        self._lengths = [float(np.linalg.norm(total)) for total in self._sums]
        self._neighbours = NEIGHBOURS + len(index) - len(exemplars)

    def only(self, tasks: Container[str], threshold: float | None = None) -> Retriever:
        """As if there were no other tasks: without a `threshold`, theirs alone calibrate it."""
        kept = [
            Exemplar(task, "", vector, self.embedder.id)
            for task, vectors in zip(self._tasks, self._vectors, strict=True)
            if task in tasks
            for vector in vectors
        ]
        threshold = calibrate_threshold(kept).threshold if threshold is None else threshold
        return Retriever(self.embedder, self.index, threshold, kept)

    def decide(self, query: str) -> Retrieval:
        if not query.strip():
            raise InvalidInput("An empty query belongs to no task. Write the query, or name the task.", param="query")
        vectors = self.embedder.embed([query if len(query) <= MOST_READ else query.strip()[:MOST_READ]])  # [1, d]
        [hits] = self.index.search(vectors, self._neighbours)
        return decide(self._rank(vectors, hits), self.threshold)

    def _rank(self, query: F32, hits: Sequence[Hit]) -> tuple[Ranked, ...]:
        """Scores of the tasks among the hits, and of every other task that could still beat the best of them."""
        found = {hit.task for hit in hits}
        scores = {place: self._score(query, place) for place, task in enumerate(self._tasks) if task in found}
        best, farthest = max(scores.values(), default=-np.inf), hits[-1].similarity if hits else 1.0
        for place, total in enumerate(self._sums):
            if place not in scores:  # its exemplars are all at least as far as the farthest hit
                bound = (farthest + float(query[0] @ total) / max(self._lengths[place], ROUNDING)) / 2
                if bound >= best - ROUNDING:
                    scores[place] = self._score(query, place)
        return in_order(Ranked(self._tasks[place], score) for place, score in scores.items())

    def _score(self, query: F32, place: int) -> float:
        """`task_scores` of one query and exemplars that are all there: a query waits for it once for each task."""
        similarities = np.sort(self._vectors[place] @ query[0].astype(np.float64))  # [m]
        centre = similarities.sum() / max(self._lengths[place], ROUNDING)
        return float(similarities[-TOP:].mean() + centre) / 2


def task_scores(similarities: F64, lengths: F64) -> F64:
    """How well each query fits one task, [n]: half the mean of its `TOP` nearest, half the cosine to the mean of all.

    `similarities` [n, m] are cosines to the task's exemplars, -inf for one that is left out; `lengths` [n] (or [1]) are
    those of the sum of the exemplars that are left: the cosine to their mean then needs no vector. -inf for none left.
    """
    there = np.isfinite(similarities)  # [n, m]
    count = there.sum(axis=1)  # [n]
    known = np.where(there, similarities, 0.0)  # [n, m]
    nearest = np.sort(np.where(there, similarities, -np.inf), axis=1)[:, ::-1][:, :TOP]  # [n, <= TOP]
    near = np.where(np.isfinite(nearest), nearest, 0.0).sum(axis=1) / np.clip(count, 1, TOP)  # [n]
    centre = known.sum(axis=1) / np.maximum(lengths, ROUNDING)  # [n]; exemplars that cancel out have no direction: 0
    return np.where(count > 0, (near + centre) / 2, -np.inf)  # [n]


def in_order(ranked: Iterable[Ranked]) -> tuple[Ranked, ...]:
    """Best first, ties by name."""
    return tuple(sorted(ranked, key=lambda r: (-r.similarity, r.task)))


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


def untold(threshold: float) -> Retrieval:
    """There is no text to search by, and none is needed: exact mode serves whatever the task is."""
    return Retrieval(None, None, None, threshold, "no-text", ())


def calibrate_threshold(exemplars: Sequence[Exemplar]) -> Calibration:
    """The threshold that best parts queries of known tasks from queries of unknown ones.

    Each exemplar is scored twice: against the others of its own task (it should be accepted), and, as if its task did
    not exist, against all other tasks (it should be rejected). The threshold maximises the mean of both shares.
    """
    inside, across = _leave_one_out(exemplars)
    threshold = _best_threshold(inside, across)
    return Calibration(
        threshold=threshold,
        accepted=float((inside >= threshold).mean()) if inside.size else None,
        rejected=float((across < threshold).mean()) if across.size else None,
        auroc=auroc(inside, across),
        exemplars=len(exemplars),
    )


def _leave_one_out(exemplars: Sequence[Exemplar]) -> tuple[F64, F64]:
    """Scores of exemplars in their own task without themselves, and in the best other task."""
    _check_vectors(exemplars)
    if not exemplars:
        return np.zeros(0), np.zeros(0)
    vectors = np.stack([e.vector for e in exemplars]).astype(np.float64)  # [n, d]
    names, task = np.unique([e.task for e in exemplars], return_inverse=True)  # [t], [n]
    scores = np.stack([_scores_in(vectors, np.flatnonzero(task == t)) for t in range(len(names))], axis=1)  # [n, t]
    own = np.arange(len(exemplars)), task
    inside = scores[own].copy()  # [n]
    scores[own] = -np.inf
    across = scores.max(axis=1)  # [n]
    return inside[np.isfinite(inside)], across[np.isfinite(across)]


def _scores_in(vectors: F64, rows: npt.NDArray[np.intp]) -> F64:
    """Every exemplar's score [n] in the task of `rows`, itself left out; -inf where none is left."""
    similarities = vectors @ vectors[rows].T  # [n, m]
    similarities[rows, np.arange(len(rows))] = -np.inf
    total = vectors[rows].sum(axis=0)  # [d]
    lengths = np.full(len(vectors), np.linalg.norm(total))  # [n]
    lengths[rows] = np.linalg.norm(total - vectors[rows], axis=1)  # [m]
    return task_scores(similarities, lengths)  # [n]


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
