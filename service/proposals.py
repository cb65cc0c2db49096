"""New tasks out of queries that were near none: clustered by their embeddings, named by their words.

Average linkage merges two groups by the mean similarity of their pairs; how similar is similar enough is read off the
known tasks. Knows no HTTP. n queries, m exemplars, d dimensions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.embedder import Embedder
from store.records import F32, F64, Exemplar, UnmatchedQuery

LEAST = 8  # different queries: fewer are no task
NO_EVIDENCE = 0.5  # mean similarity inside a task, where known tasks can't tell
MOST_REMEMBERED = 10_000  # vectors, as many as queries can be kept: fewer would be embedded again at every look
MOST_CLUSTERED = 2000  # queries: their distances are 32 MB, and the time is that of their square
PORTION = 1024  # queries that are compared with the groups at once
WORD = r"(?u)\b[^\W\d_]{3,}\b"


@dataclass(frozen=True, slots=True)
class Proposal:
    """A group of queries that might be a task. `cohesion` is the mean similarity of their pairs."""

    id: str
    name: str
    queries: tuple[UnmatchedQuery, ...]  # the most typical first
    cohesion: float

    @property
    def asked(self) -> int:
        return sum(query.count for query in self.queries)


class Proposer:
    """Remembers vectors of queries, so that each is embedded once, and the last answer. One call at a time works."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder
        self._vectors: OrderedDict[str, F32] = OrderedDict()
        self._last: tuple[object, list[Proposal]] = None, []
        self._working = threading.Lock()

    def propose(self, queries: Sequence[UnmatchedQuery], exemplars: Sequence[Exemplar]) -> list[Proposal]:
        """The groups of at least `LEAST` queries, the most asked first. `queries`: the newest first."""
        asked = tuple(queries), tuple((exemplar.task, exemplar.text) for exemplar in exemplars)
        with self._working:
            if self._last[0] != asked:
                self._last = asked, self._propose(queries, exemplars)
            return list(self._last[1])

    def _propose(self, queries: Sequence[UnmatchedQuery], exemplars: Sequence[Exemplar]) -> list[Proposal]:
        if len(queries) < LEAST:
            return []
        vectors = self._embed(queries)  # [n, d]
        level = level_of(exemplars)
        groups = joined(grouped(vectors[:MOST_CLUSTERED], level), vectors, level)
        taken = {exemplar.task for exemplar in exemplars}
        names = named([[queries[i].text for i in group] for group in groups], [e.text for e in exemplars], taken)
        made = [_proposal(name, group, queries, vectors) for name, group in zip(names, groups, strict=True)]
        return sorted(made, key=lambda one: (-one.asked, one.id))

    def _embed(self, queries: Sequence[UnmatchedQuery]) -> F64:
        known = self._vectors.copy()
        new = [query for query in queries if query.digest not in known]
        if new:
            embedded = self._embedder.embed([query.text for query in new])  # [new, d]
            known.update(zip((query.digest for query in new), embedded, strict=True))
        found = np.stack([known[query.digest] for query in queries]).astype(np.float64)  # [n, d]
        while len(known) > MOST_REMEMBERED:
            known.popitem(last=False)
        self._vectors = known
        return found


def level_of(exemplars: Sequence[Exemplar]) -> float:
    """The mean similarity that parts pairs inside a task from pairs of two tasks: half-way between nine tenths of
    both."""
    tasks: dict[str, list[F32]] = {}
    for exemplar in exemplars:
        tasks.setdefault(exemplar.task, []).append(exemplar.vector)
    large = [np.stack(vectors).astype(np.float64) for vectors in tasks.values() if len(vectors) > 1]
    if len(large) < 2:
        return NO_EVIDENCE
    means = [vectors.mean(axis=0) for vectors in large]
    inside = [cohesion_of(vectors) for vectors in large]
    across = [float(a @ b) for place, a in enumerate(means) for b in means[:place]]  # the mean over all pairs
    return float(np.quantile(inside, 0.1) + np.quantile(across, 0.9)) / 2


def cohesion_of(vectors: F64) -> float:
    """The mean similarity of all pairs of `vectors` [n, d], each with another."""
    count = len(vectors)
    total = vectors.sum(axis=0)
    return float((total @ total - (vectors * vectors).sum()) / (count * (count - 1)))


def grouped(vectors: F64, level: float) -> list[npt.NDArray[np.intp]]:
    """Rows of `vectors` [n, d] that belong together: groups of at least `LEAST`."""
    from sklearn.cluster import AgglomerativeClustering  # noqa: PLC0415 - slow to import, and seldom wanted

    distances = np.clip(1.0 - vectors @ vectors.T, 0.0, None)  # [n, n]
    method = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=1.0 - level
    )
    labels = method.fit_predict(distances)  # [n]
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [group for group in groups if len(group) >= LEAST]


def joined(groups: Sequence[npt.NDArray[np.intp]], vectors: F64, level: float) -> list[npt.NDArray[np.intp]]:
    """The groups of the first `MOST_CLUSTERED` rows of `vectors` [n, d], and each later row in the one that it is most
    similar to, where the mean similarity is at least `level`."""
    if not groups:
        return []
    means = np.stack([vectors[group].mean(axis=0) for group in groups])  # [groups, d]
    found = [group.tolist() for group in groups]
    for start in range(MOST_CLUSTERED, len(vectors), PORTION):
        similarities = vectors[start : start + PORTION] @ means.T  # [rows, groups]
        for row, place in enumerate(similarities.argmax(axis=1)):
            if similarities[row, place] >= level:
                found[int(place)].append(start + row)
    return [np.array(group, dtype=np.intp) for group in found]


def named(groups: Sequence[Sequence[str]], others: Sequence[str], taken: Collection[str]) -> list[str]:
    """For each group the two words that set it apart from the other groups and from `others`; no name twice."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415 - as above

    names: list[str] = []
    texts = [" ".join(group) for group in groups]
    weights: Mapping[int, list[str]] = {}
    try:
        method = TfidfVectorizer(stop_words="english", token_pattern=WORD, sublinear_tf=True)
        table = method.fit_transform([*texts, *others]).toarray()  # [groups + others, words]
        words = method.get_feature_names_out()
        weights = {place: [words[w] for w in np.argsort(-row, kind="stable")[:2] if row[w] > 0]
                   for place, row in enumerate(table[: len(texts)])}  # fmt: skip
    except ValueError:  # not one word among them
        weights = {}
    for place in range(len(groups)):
        wanted = name = "-".join(weights.get(place, [])) or "new-task"
        number = 2
        while name in taken or name in names:
            name, number = f"{wanted}-{number}", number + 1
        names.append(name)
    return names


def _proposal(name: str, group: npt.NDArray[np.intp], queries: Sequence[UnmatchedQuery], vectors: F64) -> Proposal:
    members = vectors[group]  # [m, d]
    typical = np.argsort(-(members @ members.mean(axis=0)), kind="stable")  # [m]
    chosen = tuple(queries[int(group[i])] for i in typical)
    first = min(query.digest for query in chosen)  # of a group of n the next query changes it once in n + 1 times
    return Proposal(first[:16], name, chosen, cohesion_of(members))
