"""Selections with stand-ins in the service: attached from the profile, chosen by evidence where there is memory."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from engine.plan import MemoryPlan
from service.serving import Catalogue, Policy, choose_candidate
from store.database import open_store
from store.fingerprint import Fingerprint
from store.records import Evaluation, ModelRecord, Profile, Selection, StoredSelection, TaskRecord
from store.stand_ins import NOVICE

HALF = Selection.of([[0, 1], [2, 3]])


def _plan(stand_ins: int) -> MemoryPlan:
    values = {field.name: 1000 if field.name.endswith("_bytes") else 4 for field in fields(MemoryPlan)}
    shape = {"top_k": 2, "least": 2, "layers": 2, "slots": 8, "stand_ins": stand_ins}
    return MemoryPlan(**{**values, **shape, "dtype": "float32", "slots_in": "float32"})  # type: ignore[arg-type]


def test_one_with_stand_ins_serves_where_it_is_better_and_there_is_memory_for_it(tmp_path: Path) -> None:
    statistics = {"selected": np.ones((2, 2, 2, 4)), "output_sums": np.ones((2, 2, 4, 3))}
    plain = StoredSelection("plain", "p", "gate", "uniform", 0.5, HALF)
    with open_store(f"sqlite:///{tmp_path}/s.db") as store:
        store.models.put(ModelRecord("f" * 64, "m", "tiny", 2, 4, 2, "c", "w", "t"))
        store.tasks.put(TaskRecord("t"))
        profile = Profile("p", "f" * 64, "t", statistics, 9, "h", frozenset(), {}, datetime.now(UTC))
        better = replace(plain, id="better", stand_in=NOVICE)
        worse = replace(plain, id="worse", stand_in=NOVICE, selection=Selection.of([[0, 3], [2, 3]]))
        store.profiles.put(
            profile, [plain, better, worse],
            [Evaluation(name, "e", 10, accuracy, 1.0, 0.5, 0.9)
             for name, accuracy in (("plain", 0.7), ("better", 0.8), ("worse", 0.6))],
        )  # fmt: skip
        task = Catalogue.read(store, Fingerprint("c", "w", "t", whole="f" * 64)).tasks["t"]
    vectors = {one.stored.id: one.stored.selection.stand_in for one in task.candidates}
    assert vectors["plain"] is None
    assert vectors["better"] is not None
    assert vectors["better"] is vectors["worse"]
    assert np.array_equal(vectors["better"].vectors, np.full((2, 4, 3), 0.5))
    without, having = Policy(_plan(0)), Policy(_plan(1))
    assert choose_candidate(task, None, None, without).stored.id == "plain"
    chosen = choose_candidate(task, None, None, having).stored
    assert (chosen.id, chosen.stand_in) == ("better", NOVICE)
    assert having.plan.bytes_of(chosen.selection) == 4 * 1000 + 2 * 4 * 3 * 4
