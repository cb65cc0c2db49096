from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.database import Store
from store.errors import CorruptStore, InvalidInput, MismatchError
from store.records import Exemplar, TaskRecord
from store.vectors import VectorIndex

MakeExemplars = Callable[..., list[Exemplar]]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(
    tasks=st.integers(1, 4),
    each=st.integers(1, 30),
    width=st.integers(1, 40),
    k=st.integers(1, 60),
    seed=st.integers(0, 10**6),
)
def test_hits_are_those_of_brute_force(tasks: int, each: int, width: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    exemplars = [
        Exemplar(f"task {t}", f"{t}.{i}", unit(rng.normal(size=width)), "hash")
        for t in range(tasks)
        for i in range(each)
    ]
    queries = unit(rng.normal(size=(3, width)))  # [n, d]
    found = VectorIndex.rebuild(exemplars).search(queries, k)
    similarities = queries @ np.stack([exemplar.vector for exemplar in exemplars]).T  # [n, m]
    for hits, row in zip(found, similarities, strict=True):
        assert len(hits) == min(k, len(exemplars))
        assert np.allclose([hit.similarity for hit in hits], np.sort(row)[::-1][: len(hits)], atol=1e-5)
        by_text = {exemplar.text: (exemplar.task, float(row[i])) for i, exemplar in enumerate(exemplars)}
        for hit in hits:
            task, similarity = by_text[hit.text]
            assert hit.task == task
            assert hit.similarity == pytest.approx(similarity, abs=1e-5)
        assert len({hit.text for hit in hits}) == len(hits)


def test_an_exemplar_finds_itself_first_with_similarity_one(make_exemplars: MakeExemplars) -> None:
    exemplars = make_exemplars("sql", 50, width=16)
    found = VectorIndex.rebuild(exemplars).search(np.stack([e.vector for e in exemplars]), 3)
    assert [hits[0].text for hits in found] == [exemplar.text for exemplar in exemplars]
    assert all(hits[0].similarity == pytest.approx(1, abs=1e-5) for hits in found)
    assert all(hits[0].similarity <= 1 for hits in found)


def test_equal_similarities_come_in_the_order_stored() -> None:
    vector = np.eye(8, dtype=np.float32)[3]
    exemplars = [Exemplar("sql", str(n), vector, "hash") for n in range(9)]
    [hits] = VectorIndex.rebuild(exemplars).search(vector[None], 9)
    assert [hit.text for hit in hits] == [str(n) for n in range(9)]


def test_an_empty_index_finds_nothing() -> None:
    index = VectorIndex.rebuild([])
    assert (len(index), index.dimension, index.embedder) == (0, None, None)
    assert index.search(unit(np.ones((3, 5))), 4) == [[], [], []]
    index.check([])


def test_no_queries_have_no_hits(make_exemplars: MakeExemplars) -> None:
    assert VectorIndex.rebuild(make_exemplars("sql", 3)).search(np.empty((0, 8), np.float32), 4) == []


def test_a_query_of_another_width_is_refused_with_both(make_exemplars: MakeExemplars) -> None:
    index = VectorIndex.rebuild(make_exemplars("sql", 3, width=8))
    with pytest.raises(MismatchError, match=r"hash vectors of width 8, the query has 9.*embedder"):
        index.search(unit(np.ones((1, 9))), 4)


@pytest.mark.parametrize(
    "queries",
    [np.ones(8), np.ones((1, 8)), np.zeros((1, 8)), np.full((1, 8), np.nan), np.eye(8)[None], np.empty((1, 0))],
)
def test_queries_that_are_no_rows_of_length_one_are_refused(make_exemplars: MakeExemplars, queries: np.ndarray) -> None:
    index = VectorIndex.rebuild(make_exemplars("sql", 3, width=8))
    with pytest.raises(InvalidInput, match="length 1"):
        index.search(queries.astype(np.float32), 4)


def test_at_least_one_neighbour_is_asked_for(make_exemplars: MakeExemplars) -> None:
    with pytest.raises(InvalidInput, match="k = 0"):
        VectorIndex.rebuild(make_exemplars("sql", 3)).search(unit(np.ones((1, 8))), 0)


@pytest.mark.parametrize("other", [{"embedder": "minilm"}, {"width": 9}])
def test_one_index_holds_one_embedder(make_exemplars: MakeExemplars, other: dict[str, object]) -> None:
    with pytest.raises(MismatchError, match=r"one embedder, got .*hash \[8\]"):
        VectorIndex.rebuild(make_exemplars("sql", 2) + make_exemplars("code", 2, **other))


def test_many_threads_may_search_at_once(make_exemplars: MakeExemplars) -> None:
    exemplars = make_exemplars("sql", 200, width=16)
    index = VectorIndex.rebuild(exemplars)
    queries = np.stack([exemplar.vector for exemplar in exemplars])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: index.search(queries[n : n + 1], 1)[0][0].text, range(200)))
    assert found == [exemplar.text for exemplar in exemplars]


def test_check_accepts_its_own_exemplars_and_no_others(make_exemplars: MakeExemplars) -> None:
    exemplars = make_exemplars("sql", 5)
    index = VectorIndex.rebuild(exemplars)
    index.check(exemplars)
    other = make_exemplars("sql", 5, seed=1)
    for wrong in (exemplars[:4], exemplars[::-1], [*exemplars, other[0]], [*exemplars[:4], other[4]], []):
        with pytest.raises(CorruptStore, match="disagrees with the store"):
            index.check(wrong)
    with pytest.raises(CorruptStore):
        index.check([*exemplars[:4], replace(exemplars[4], text="other text")])


def test_check_looks_at_the_vectors_that_faiss_holds(make_exemplars: MakeExemplars) -> None:
    exemplars = make_exemplars("sql", 5)
    index = VectorIndex.rebuild(exemplars)
    faiss.rev_swig_ptr(index._index.get_xb(), 5 * 8)[11] += 0.25  # a bit flips in memory
    with pytest.raises(CorruptStore, match="vectors are not those of the store"):
        index.check(exemplars)


# --- saved beside the store ------------------------------------------------------------------------------------------


@pytest.fixture
def exemplars(stocked: Store, make_exemplars: MakeExemplars) -> list[Exemplar]:
    stocked.tasks.put(TaskRecord("code"))
    stocked.exemplars.replace("sql", make_exemplars("sql", 6))
    stocked.exemplars.replace("code", make_exemplars("code", 4))
    stocked.exemplars.replace("code", make_exemplars("code", 2, width=3, embedder="signature"))
    return list(stocked.exemplars.list(embedder="hash"))


def opened(store: Store, folder: Path) -> VectorIndex:
    return VectorIndex.load_or_rebuild(store, "hash", folder)


def saved(folder: Path) -> tuple[Path, Path]:
    [index] = folder.glob("*.faiss")
    return index, index.with_suffix(".json")


def test_the_index_is_built_from_sql_saved_and_loaded(
    stocked: Store, exemplars: list[Exemplar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(stocked, tmp_path / "index")
    first.check(exemplars)
    assert (len(first), first.dimension, first.embedder) == (10, 8, "hash")
    index, manifest = saved(tmp_path / "index")
    assert json.loads(manifest.read_text()).items() >= {"embedder": "hash", "dimension": 8, "count": 10}.items()
    monkeypatch.delattr(type(stocked.exemplars), "list")  # a saved index needs no vector from SQL
    second = opened(stocked, tmp_path / "index")
    second.check(exemplars)
    queries = np.stack([exemplar.vector for exemplar in exemplars])
    assert second.search(queries, 10) == first.search(queries, 10)
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == sorted([index.name, manifest.name])


def test_embedders_keep_their_indexes_apart(stocked: Store, exemplars: list[Exemplar], tmp_path: Path) -> None:
    opened(stocked, tmp_path)
    signature = VectorIndex.load_or_rebuild(stocked, "signature", tmp_path)
    assert (len(signature), signature.dimension) == (2, 3)
    opened(stocked, tmp_path).check(exemplars)
    assert len(list(tmp_path.glob("*.faiss"))) == 2


def test_an_embedder_without_exemplars_has_an_empty_index(stocked: Store, tmp_path: Path) -> None:
    index = VectorIndex.load_or_rebuild(stocked, "minilm", tmp_path)
    assert (len(index), index.embedder) == (0, "minilm")
    assert index.search(unit(np.ones((1, 8))), 3) == [[]]


def test_new_exemplars_in_sql_make_a_new_index(
    stocked: Store, exemplars: list[Exemplar], make_exemplars: MakeExemplars, tmp_path: Path
) -> None:
    opened(stocked, tmp_path)
    for new in (make_exemplars("sql", 3, seed=9), make_exemplars("sql", 6, seed=9), []):
        stocked.exemplars.replace("sql", new)
        opened(stocked, tmp_path).check(stocked.exemplars.list(embedder="hash"))


def damage_index(index: Path, manifest: Path) -> None:
    content = bytearray(index.read_bytes())
    content[-3] ^= 1
    index.write_bytes(content)


def truncate_index(index: Path, manifest: Path) -> None:
    index.write_bytes(index.read_bytes()[:-10])


def remove_index(index: Path, manifest: Path) -> None:
    index.unlink()


def remove_manifest(index: Path, manifest: Path) -> None:
    manifest.unlink()


def break_manifest(index: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text()[:-20])


def change_manifest(index: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))


def extend_manifest(index: Path, manifest: Path) -> None:
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "colour": "green"}))


def swap_embedder(index: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"hash"', '"minilm"'))


@pytest.mark.parametrize(
    "damage",
    [
        damage_index,
        truncate_index,
        remove_index,
        remove_manifest,
        break_manifest,
        change_manifest,
        extend_manifest,
        swap_embedder,
    ],
)
def test_a_damaged_index_is_made_anew_with_a_warning(
    stocked: Store,
    exemplars: list[Exemplar],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path, Path], None],
) -> None:
    opened(stocked, tmp_path)
    good = [file.read_bytes() for file in saved(tmp_path)]
    damage(*saved(tmp_path))
    with caplog.at_level(logging.WARNING):
        opened(stocked, tmp_path).check(exemplars)
    assert [file.read_bytes() for file in saved(tmp_path)] == good
    assert ("made anew" in caplog.text) == (damage is not remove_manifest)  # a missing one is no news


def test_an_index_that_can_not_be_saved_still_serves(
    stocked: Store, exemplars: list[Exemplar], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        opened(stocked, tmp_path / "file").check(exemplars)
    assert "could not be saved" in caplog.text


def test_threads_that_build_at_once_leave_a_good_index(
    stocked: Store, exemplars: list[Exemplar], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(4) as pool:
        for index in pool.map(lambda _: opened(stocked, tmp_path), range(8)):
            index.check(exemplars)
    caplog.clear()
    opened(stocked, tmp_path).check(exemplars)
    assert caplog.text == ""
