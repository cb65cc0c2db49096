from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from store.database import Store
from store.errors import CorruptStore, InvalidInput, NotFound
from store.records import Evaluation, Exemplar, ModelRecord, Profile, StoredSelection, TaskRecord

MakeExemplars = Callable[..., list[Exemplar]]


def test_a_model_comes_back_as_it_was(store: Store, model: ModelRecord) -> None:
    store.models.put(model)
    assert store.models.get(model.fingerprint) == model
    assert store.models.list() == [model]


def test_a_model_put_again_is_renamed_not_doubled(store: Store, model: ModelRecord) -> None:
    store.models.put(model)
    store.models.put(replace(model, name="Another name"))
    assert [found.name for found in store.models.list()] == ["Another name"]


def test_models_are_listed_in_the_order_they_came(store: Store, model: ModelRecord) -> None:
    for letter in "zay":
        store.models.put(replace(model, fingerprint=letter * 64))
    assert [found.fingerprint[0] for found in store.models.list()] == ["z", "a", "y"]


def test_an_unknown_model_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="No model abc"):
        store.models.get("abc")


def test_tasks_are_looked_up_and_listed_by_name(store: Store) -> None:
    for name in ("zoo", "Été à la plage", "arithmetic"):
        store.tasks.put(TaskRecord(name, f"about {name}"))
    assert store.tasks.get("Été à la plage") == TaskRecord("Été à la plage", "about Été à la plage")
    assert {task.name for task in store.tasks.list()} == {"arithmetic", "zoo", "Été à la plage"}
    assert [task.name for task in store.tasks.list() if task.name.isascii()] == ["arithmetic", "zoo"]


def test_a_task_put_again_gets_its_new_description(store: Store) -> None:
    store.tasks.put(TaskRecord("sql", "old"))
    store.tasks.put(TaskRecord("sql", "new"))
    assert store.tasks.list() == [TaskRecord("sql", "new")]


@pytest.mark.parametrize("name", ["", " ", " sql", "sql\n", "a\x00b", "x" * 201])
def test_a_name_that_can_not_be_typed_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidInput, match="1 to 200 printable characters") as caught:
        store.tasks.put(TaskRecord(name))
    assert caught.value.param == "task"
    assert store.tasks.list() == []


@pytest.mark.parametrize("name", ["none", ".", "..", "a/../b", "./a"])
def test_a_name_that_means_something_else_in_metrics_or_urls_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"choose another|stands in URLs"):
        store.tasks.put(TaskRecord(name))
    store.tasks.put(TaskRecord("a.b/c..d"))
    assert [task.name for task in store.tasks.list()] == ["a.b/c..d"]


def test_an_unknown_task_is_not_found_and_the_known_ones_are_named(stocked: Store) -> None:
    for ask in (stocked.tasks.get, stocked.tasks.delete, lambda name: stocked.exemplars.replace(name, [])):
        with pytest.raises(NotFound, match=r"No task 'french' is in the store\. Known: sql"):
            ask("french")


def test_deleting_a_task_takes_all_that_was_made_of_it_and_nothing_else(
    stocked: Store,
    make_profile: Callable[..., Profile],
    make_selection: Callable[..., StoredSelection],
    make_evaluation: Callable[..., Evaluation],
    make_exemplars: MakeExemplars,
) -> None:
    stocked.tasks.put(TaskRecord("other"))
    for task, tag in (("sql", "1"), ("other", "2")):
        stocked.exemplars.replace(task, make_exemplars(task, 2))
        selection = make_selection(id=f"s{tag}", profile=f"p{tag}")
        stocked.profiles.put(make_profile(id=f"p{tag}", task=task), [selection], [make_evaluation(selection=f"s{tag}")])
    stocked.tasks.delete("sql")
    assert [task.name for task in stocked.tasks.list()] == ["other"]
    assert {exemplar.task for exemplar in stocked.exemplars.list()} == {"other"}
    assert [profile.id for profile in stocked.profiles.list()] == ["p2"]
    assert stocked.selections.find("p1") == []
    assert stocked.evaluations.find("s1") is None
    assert stocked.evaluations.find("s2") is not None
    assert len(stocked.models.list()) == 1


def same(left: list[Exemplar], right: list[Exemplar]) -> bool:
    vectors = all(np.array_equal(a.vector, b.vector) for a, b in zip(left, right, strict=True))
    return left == right and vectors


def test_exemplars_come_back_bit_for_bit_in_the_order_given(stocked: Store, make_exemplars: MakeExemplars) -> None:
    given = make_exemplars("sql", 20)[::-1]
    stocked.exemplars.replace("sql", given)
    found = list(stocked.exemplars.list(task="sql"))
    assert same(found, given)
    assert all(exemplar.vector.dtype == np.float32 for exemplar in found)


def test_replacing_exemplars_leaves_no_old_ones(stocked: Store, make_exemplars: MakeExemplars) -> None:
    stocked.exemplars.replace("sql", make_exemplars("sql", 5))
    new = make_exemplars("sql", 2, seed=1)
    stocked.exemplars.replace("sql", new)
    assert same(list(stocked.exemplars.list()), new)


def test_exemplars_of_another_embedder_stay(stocked: Store, make_exemplars: MakeExemplars) -> None:
    minilm, signature = make_exemplars("sql", 3, embedder="minilm"), make_exemplars("sql", 4, embedder="signature")
    stocked.exemplars.replace("sql", minilm)
    stocked.exemplars.replace("sql", signature)
    assert same(list(stocked.exemplars.list(embedder="minilm")), minilm)
    assert same(list(stocked.exemplars.list(embedder="signature", task="sql")), signature)
    stocked.exemplars.replace("sql", [])
    assert stocked.exemplars.list() == []


def test_labels_are_the_exemplars_without_vectors(stocked: Store, make_exemplars: MakeExemplars) -> None:
    stocked.tasks.put(TaskRecord("code"))
    stocked.exemplars.replace("sql", make_exemplars("sql", 3))
    stocked.exemplars.replace("code", make_exemplars("code", 3))
    listed = stocked.exemplars.list(embedder="hash")
    labels = stocked.exemplars.labels("hash")
    assert [(label.task, label.text) for label in labels] == [(e.task, e.text) for e in listed]
    assert len({label.digest for label in labels}) == 6
    assert stocked.exemplars.labels("minilm") == []


@pytest.mark.parametrize(
    "vector",
    [
        np.array([2.0, 0.0]),
        np.array([0.0, 0.0]),
        np.array([np.nan, 1.0]),
        np.eye(2),
        np.array([]),
        np.array([np.inf, 0]),
    ],
)
def test_only_unit_vectors_are_stored(stocked: Store, make_exemplars: MakeExemplars, vector: np.ndarray) -> None:
    old = make_exemplars("sql", 2)
    stocked.exemplars.replace("sql", old)
    with pytest.raises(InvalidInput, match="length 1"):
        stocked.exemplars.replace("sql", [Exemplar("sql", "q", vector.astype(np.float32), "hash")])
    assert same(list(stocked.exemplars.list()), old)


def test_an_exemplar_of_another_task_is_refused(stocked: Store, make_exemplars: MakeExemplars) -> None:
    with pytest.raises(InvalidInput, match="'code' can't be one of 'sql'"):
        stocked.exemplars.replace("sql", make_exemplars("code", 1))


@pytest.mark.parametrize("text", ["a\ud800b", "a\0b"])
def test_text_that_is_no_unicode_is_refused_and_the_old_stays(
    stocked: Store, make_exemplars: MakeExemplars, text: str
) -> None:
    old = make_exemplars("sql", 2)
    stocked.exemplars.replace("sql", old)
    with pytest.raises(InvalidInput, match="Unicode"):
        stocked.exemplars.replace("sql", [replace(old[0], text=text)])
    assert same(list(stocked.exemplars.list()), old)


def test_a_damaged_vector_names_its_exemplar(
    stocked: Store, make_exemplars: MakeExemplars, run_sql: Callable[[str], None]
) -> None:
    stocked.exemplars.replace("sql", make_exemplars("sql", 1))
    run_sql("UPDATE exemplars SET vector = ''")
    with pytest.raises(CorruptStore, match="'sql 0' is damaged"):
        stocked.exemplars.list()
