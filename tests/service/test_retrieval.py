"""Ranking, deciding and calibrating. The calibration is compared with a slow, plain version of itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

import service.retrieval
from engine.embedder import HashEmbedder
from service.retrieval import Ranked, Retriever, auroc, calibrate_threshold, decide, in_order, pinned, task_scores
from store.errors import CorruptStore, InvalidInput
from store.records import F32, Exemplar
from store.vectors import VectorIndex

TEXTS = {
    "cooking": ["how long do I boil an egg", "how long do I boil potatoes", "boil rice how long"],
    "sql": ["select all rows from the users table", "select rows from orders", "select names from the table users"],
}


def exemplars_of(texts: dict[str, list[str]]) -> list[Exemplar]:
    embedder = HashEmbedder()
    return [
        Exemplar(t, q, v, embedder.id) for t, qs in texts.items() for q, v in zip(qs, embedder.embed(qs), strict=True)
    ]


def random_exemplars(rng: np.random.Generator, tasks: int, each: int, dimension: int = 8) -> list[Exemplar]:
    vectors = rng.normal(size=(tasks, each, dimension)) + 2 * rng.normal(size=(tasks, 1, dimension))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return [
        Exemplar(f"t{t}", f"{t} {i}", vectors[t, i].astype(np.float32), "e") for t in range(tasks) for i in range(each)
    ]


def plain_score(query: F32, exemplars: list[Exemplar]) -> float:
    """Half the mean of the three nearest, half the cosine to the normalised mean."""
    vectors = [e.vector.astype(float) for e in exemplars]
    nearest = sorted((float(v @ query.astype(float)) for v in vectors), reverse=True)[:3]
    mean = sum(vectors) / len(vectors)
    return (sum(nearest) / len(nearest) + float(mean @ query.astype(float)) / math.sqrt(mean @ mean)) / 2


def plain_scores(query: F32, exemplars: list[Exemplar]) -> dict[str, float]:
    tasks = {e.task for e in exemplars}
    return {task: plain_score(query, [e for e in exemplars if e.task == task]) for task in tasks}


def plain_leave_one_out(exemplars: list[Exemplar]) -> tuple[list[float], list[float]]:
    inside, across = [], []
    for query in exemplars:
        scores = plain_scores(query.vector, [e for e in exemplars if e is not query])
        if query.task in scores:
            inside.append(scores.pop(query.task))
        if scores:
            across.append(max(scores.values()))
    return inside, across


def quality(threshold: float, inside: list[float], across: list[float]) -> float:
    return sum(s >= threshold for s in inside) / len(inside) + sum(s < threshold for s in across) / len(across)


@pytest.mark.parametrize("each", [1, 2, 3, 7])
def test_a_tasks_score_equals_the_plain_one(each: int) -> None:
    rng = np.random.default_rng(each)
    exemplars = random_exemplars(rng, tasks=1, each=each)
    vectors = np.stack([e.vector for e in exemplars]).astype(np.float64)
    queries = rng.normal(size=(5, 8))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    got = task_scores(queries @ vectors.T, np.linalg.norm(vectors.sum(0), keepdims=True))
    assert got == pytest.approx([plain_score(q, exemplars) for q in queries])


def test_exemplars_that_cancel_out_have_no_centre() -> None:
    assert task_scores(np.array([[0.6, -0.6]]), np.zeros(1)) == pytest.approx([0.0])


def test_a_task_of_which_nothing_is_left_can_not_be_found() -> None:
    assert task_scores(np.array([[-np.inf]]), np.zeros(1)) == pytest.approx([-np.inf])


class Fixed:
    """An embedder whose next vector is given."""

    id, dimension = "e", 8

    def __init__(self, vector: F32) -> None:
        self.vector = vector

    def embed(self, texts: Sequence[str]) -> F32:
        return np.stack([self.vector for _ in texts])


@pytest.mark.parametrize("seed", range(8))
def test_the_best_task_is_the_best_of_all_however_few_neighbours_are_looked_at(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.retrieval, "NEIGHBOURS", 2)
    rng = np.random.default_rng(seed)
    exemplars = random_exemplars(rng, tasks=12, each=6)
    for _ in range(20):
        query = rng.normal(size=8).astype(np.float32)
        query /= np.linalg.norm(query)
        found = Retriever(Fixed(query), VectorIndex.rebuild(exemplars), -1.0, exemplars).decide("x")
        scores = plain_scores(query, exemplars)
        assert found.task == max(scores, key=lambda task: scores[task])
        assert {r.task: r.similarity for r in found.ranked} == pytest.approx(
            {r.task: scores[r.task] for r in found.ranked}, abs=1e-6
        )


def test_ties_go_by_name() -> None:
    assert [r.task for r in in_order([Ranked("b", 0.5), Ranked("a", 0.5), Ranked("c", 0.6)])] == ["c", "a", "b"]


def test_below_the_threshold_there_is_no_task_but_the_nearest_is_told() -> None:
    found = decide([Ranked("a", 0.4)], threshold=0.5)
    assert (found.task, found.nearest, found.similarity, found.reason) == (None, "a", 0.4, "below-threshold")


def test_the_threshold_itself_is_near_enough() -> None:
    assert decide([Ranked("a", 0.5)], threshold=0.5).task == "a"


def test_without_tasks_nothing_is_decided() -> None:
    found = decide((), 0.5)
    assert (found.task, found.nearest, found.reason) == (None, None, "no-tasks")


def test_a_named_task_is_pinned_without_a_similarity() -> None:
    found = pinned("a", 0.5)
    assert (found.task, found.similarity, found.reason) == ("a", None, "pinned")


def test_queries_find_their_task_and_others_find_none() -> None:
    exemplars = exemplars_of(TEXTS)
    threshold = calibrate_threshold(exemplars).threshold
    retriever = Retriever(HashEmbedder(), VectorIndex.rebuild(exemplars), threshold, exemplars)
    assert retriever.decide("how long do I boil an onion").task == "cooking"
    assert retriever.decide("select names from orders").task == "sql"
    assert retriever.decide("who won the cup final yesterday").task is None


def test_tasks_that_are_not_asked_for_are_looked_past() -> None:
    many = {"sql": TEXTS["sql"], "cooking": [f"how long do I boil egg number {i}" for i in range(80)]}
    exemplars = exemplars_of(many)
    own = [e for e in exemplars if e.task == "sql"]
    retriever = Retriever(HashEmbedder(), VectorIndex.rebuild(exemplars), -1.0, own)
    assert [r.task for r in retriever.decide("how long do I boil an egg").ranked] == ["sql"]


def test_an_empty_query_is_refused() -> None:
    retriever = Retriever(HashEmbedder(), VectorIndex.rebuild([]), 0.5, [])
    with pytest.raises(InvalidInput, match="empty query"):
        retriever.decide(" \n")


@pytest.mark.parametrize("seed", range(8))
def test_the_calibrated_threshold_is_the_best_there_is(seed: int) -> None:
    rng = np.random.default_rng(seed)
    exemplars = random_exemplars(rng, tasks=int(rng.integers(2, 5)), each=int(rng.integers(2, 6)))
    inside, across = plain_leave_one_out(exemplars)
    found = calibrate_threshold(exemplars)
    best = max(quality(t, inside, across) for t in [*inside, *across, math.inf])
    assert quality(found.threshold, inside, across) == pytest.approx(best)
    assert found.accepted == pytest.approx(sum(s >= found.threshold for s in inside) / len(inside))
    assert found.rejected == pytest.approx(sum(s < found.threshold for s in across) / len(across))


@pytest.mark.parametrize("seed", range(4))
def test_auroc_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positives, negatives = rng.integers(0, 6, 9) / 5, rng.integers(0, 6, 7) / 5  # with ties
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    assert auroc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))
    assert auroc(positives, np.zeros(0)) is None


def test_one_task_alone_is_calibrated_by_its_own_exemplars() -> None:
    found = calibrate_threshold(exemplars_of({"cooking": TEXTS["cooking"]}))
    assert 0 < found.threshold < 1
    assert (found.rejected, found.auroc) == (None, None)


def test_one_exemplar_a_task_puts_the_threshold_above_every_stranger() -> None:
    exemplars = exemplars_of({task: texts[:1] for task, texts in TEXTS.items()})
    similarity = float(exemplars[0].vector @ exemplars[1].vector)
    assert similarity < calibrate_threshold(exemplars).threshold < 1


def test_without_exemplars_the_threshold_is_a_constant() -> None:
    assert calibrate_threshold([]).threshold == 0.5


def test_a_vector_of_nan_is_named() -> None:
    [bad] = exemplars_of({"cooking": ["an egg"]})
    bad.vector[0] = np.nan
    with pytest.raises(CorruptStore, match="cooking"):
        calibrate_threshold([bad])
