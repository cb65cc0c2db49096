"""Selections with stand-ins: paid for out of the same bytes, measured, stored with their evidence, served."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.evaluate import evaluate
from profiler.job import profile_task
from profiler.options import Options
from profiler.stand_ins import choose, needs_of, pay
from profiler.statistics import Statistics
from store.database import open_store
from store.errors import BudgetError, InvalidInput
from store.records import TaskRecord
from store.stand_ins import NOVICE, attach

CALIBRATION = gather([Item(f"number {n} " + "and more " * (n % 3), "yes" * (1 + n % 2)) for n in range(8)])
HELD_OUT = gather([Item(f"what of {n}?", "no") for n in range(4)])
OPTIONS = Options(scorers=["gate"], keeps=(1.0, 0.5), stand_ins=("nothing", "novice"))


def _config(folder: Path, stand_ins: int = 1) -> EngineConfig:
    return EngineConfig(folder, max_context=128, max_batch=4, stand_ins=stand_ins)


def test_evidence_of_selections_with_stand_ins_is_stored_under_ids_of_their_own(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    options = Options(**{**{name: getattr(OPTIONS, name) for name in OPTIONS.__slots__}, "runs": tmp_path / "runs"})
    with open_store(f"sqlite:///{tmp_path}/s.db") as store, Engine.open(_config(folder)) as engine:
        made = profile_task(
            engine, store, TaskRecord("t"), CALIBRATION, HELD_OUT, embedder=HashEmbedder(), options=options
        )
        found = {(one.stand_in, one.keep): (one, evidence) for one, evidence in store.evaluations.list(made.id)}
        assert set(found) == {("nothing", 1.0), ("nothing", 0.5), (NOVICE, 0.5)}
        stored, evidence = found[NOVICE, 0.5]
        plain, plain_evidence = found["nothing", 0.5]
        served = attach(stored, made.statistics).selection
        held_out = encode_corpus(engine, HELD_OUT)
        again = evaluate(engine, held_out, served)
        assert evidence.nll == pytest.approx(again.nll, rel=1e-4)
        assert evidence.nll != pytest.approx(plain_evidence.nll, rel=1e-4)
        assert engine.plan.bytes_of(served) <= engine.plan.bytes_of(plain.selection)
        assert stored.id.endswith("-0.5-novice")
        before = len(store.evaluations.list(made.id))
        profile_task(engine, store, TaskRecord("t"), CALIBRATION, HELD_OUT, embedder=HashEmbedder(), options=options)
        assert len(store.evaluations.list(made.id)) == before


def test_without_memory_for_them_or_under_a_wrong_name_they_are_refused_before_the_pass(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    with open_store(f"sqlite:///{tmp_path}/s.db") as store, Engine.open(_config(folder, 0)) as engine:
        with pytest.raises(BudgetError, match="stand_ins"):
            profile_task(
                engine, store, TaskRecord("t"), CALIBRATION, HELD_OUT, embedder=HashEmbedder(), options=OPTIONS
            )
        assert store.profiles.list() == []
    with pytest.raises(InvalidInput, match="dern"):
        choose(["twin"])


def test_what_stands_in_is_paid_for_out_of_the_same_budget() -> None:
    layers, experts, hidden, size = 2, 8, 4, 100
    statistics = Statistics.zeros(layers, experts, 2, needs_of([NOVICE]), hidden)
    left, stand_in = pay(NOVICE, 0.5, statistics, [size] * layers, "p")
    assert stand_in is not None
    assert left == 4 * size * layers - stand_in.nbytes == 4 * size * layers - layers * experts * hidden * 4
    assert pay("nothing", 0.5, statistics, [size] * layers, "p") == (0.5, None)
    with pytest.raises(BudgetError, match="one token needs"):
        pay(NOVICE, 0.25, statistics, [size] * layers, "p")
    assert np.array_equal(stand_in.vectors, np.zeros((layers, experts, hidden)))  # no token came to any expert
