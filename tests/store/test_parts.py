"""Parts of a profile: stored once, whoever makes them, until their run is over."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from store.errors import CorruptStore, NotFound
from store.records import ProfilePart, TaskRecord

PART = ProfilePart(
    "run1", 2, 4, "f" * 64, "sql", {"gates": np.arange(6.0).reshape(2, 3)}, datetime(2026, 11, 26, 9, 30, tzinfo=UTC)
)


def test_a_part_comes_back_as_it_was_before_its_model_or_task_are_known(store):
    assert store.parts.put(PART)
    found = store.parts.get("run1", 2, 4)
    np.testing.assert_array_equal(found.statistics["gates"], PART.statistics["gates"])
    assert replace(found, statistics={}).created == PART.created
    assert (found.run, found.number, found.of, found.model, found.task) == ("run1", 2, 4, PART.model, "sql")
    with pytest.raises(NotFound, match="No part 1/4 of run run1"):
        store.parts.get("run1", 1, 4)


def test_whoever_makes_a_part_a_second_time_adds_nothing(store):
    store.parts.put(PART)
    assert not store.parts.put(replace(PART, statistics={"gates": np.ones((2, 3))}))
    assert store.parts.get("run1", 2, 4).statistics["gates"].sum() == 15
    assert list(store.parts.list("run1")) == [(2, 4)]


def test_parts_are_listed_by_cut_and_forgotten_one_by_one_or_all(store):
    for number, of in ((2, 4), (1, 4), (2, 2)):
        store.parts.put(replace(PART, number=number, of=of))
    store.parts.put(replace(PART, run="run2", task="french"))
    assert list(store.parts.list("run1")) == [(2, 2), (1, 4), (2, 4)]
    assert list(store.parts.runs()) == ["run1", "run2"]
    assert list(store.parts.runs("french")) == ["run2"]
    store.parts.forget("run1", (2, 4))
    assert list(store.parts.list("run1")) == [(2, 2), (1, 4)]
    store.parts.forget("run1")
    store.parts.forget("run1")
    assert list(store.parts.runs()) == ["run2"]


def test_parts_go_with_their_task(store):
    store.parts.put(PART)
    store.parts.put(replace(PART, run="run2", task="french"))
    store.tasks.put(TaskRecord("sql"))
    store.tasks.delete("sql")
    assert list(store.parts.runs()) == ["run2"]


def test_a_damaged_part_is_named_and_a_check_finds_it(store, run_sql):
    store.parts.put(PART)
    store.check()
    run_sql("UPDATE profile_parts SET statistics = statistics || statistics")
    run_sql("UPDATE profile_parts SET statistics = substr(statistics, 1, 40)")
    with pytest.raises(CorruptStore, match="part 2/4 of run run1"):
        store.parts.get("run1", 2, 4)
    with pytest.raises(CorruptStore, match="part 2/4"):
        store.check()
