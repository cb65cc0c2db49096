"""Text, models, disks and neighbours that are not as they should be: a clear refusal or a correct result, and never a

half-written profile. What is refused of files is in test_corpus.py, of weights in test_job.py, while streaming in
test_stream.py.
"""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.passes import Passes
from engine.tiny import write_tiny
from profiler import job, unfinished
from profiler.corpus import Item, gather
from profiler.job import profile_task
from profiler.options import Options
from profiler.run import hold
from profiler.scorers.registry import computable
from profiler.statistics import Statistics
from store.database import open_store
from store.errors import BudgetError, CheckpointError, Conflict, InvalidInput, MismatchError
from store.records import TaskRecord

NEVER = (3, 6)


def texts(seed: int, count: int):
    return gather([Item(f"{seed} {n} " + "word " * (n % 5), "yes") for n in range(count)])


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened


def run(engine, store, folder, task="t", **fields):
    options = Options(**{"rows": 4, "runs": folder / "runs", "keeps": (0.5,), **fields})
    return profile_task(
        engine, store, TaskRecord(task), texts(1, 8), texts(2, 3), embedder=HashEmbedder(), options=options
    )


def test_experts_that_the_text_never_reaches_rank_last_and_are_counted(tmp_path, store):
    """Their router rows are pushed so far that no token of any text likes them."""
    folder = write_tiny("mixtral", tmp_path / "m", seed=3)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "gate.weight" in name and tensor.shape[0] == 8:
            liked = tensor.mean(dim=0)
            tensor[list(NEVER)] = 0
            tensor[[e for e in range(8) if e not in NEVER]] += 50 * liked  # no zero row can be among the best two
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as engine:
        made = run(engine, store, tmp_path, scorers=["reap", "easy_ep", "gate", "frequency", "man"], draws=2)
    statistics = Statistics.from_arrays(made.statistics)
    silent = statistics.total("selected") == 0
    assert silent.any()
    assert made.trust is not None
    assert made.trust.unseen == pytest.approx(silent.mean())
    for scorer in computable(statistics):
        assert np.isfinite(scorer.score(statistics)).all(), scorer.name
    seen = (~silent).sum(axis=1)
    for stored in store.selections.find(made.id):
        for layer, ids in enumerate(stored.selection.experts):
            assert len(ids) == 4
            assert int(silent[layer, list(ids)].sum()) == max(0, 4 - int(seen[layer])), stored.id
    assert all(np.isfinite(evidence.nll) for _, evidence in store.evaluations.list(made.id))


@pytest.mark.parametrize("stream", [False, True])
def test_weights_behind_the_last_experts_that_are_no_numbers_leave_nothing_that_serves(tmp_path, store, stream):
    """Every expert gives numbers, and what the model says is none."""
    folder = write_tiny("mixtral", tmp_path / "m", seed=3)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with (
        Engine.open(EngineConfig(folder, max_context=128, max_batch=8)) as engine,
        pytest.raises(CheckpointError, match=r"logits are not finite .* Check the checkpoint's weights"),
    ):
        run(engine, store, tmp_path, stream=stream)
    assert list(store.profiles.list()) == []


@pytest.mark.parametrize("name", ["", " t", "a\nb"])
def test_a_task_that_can_not_be_named_so_is_refused_before_the_pass(tmp_path, store, name, monkeypatch):
    monkeypatch.setattr(Passes, "whole", lambda *_, **__: pytest.fail("a forward was run"))
    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    with (
        Engine.open(EngineConfig(folder, max_context=128)) as engine,
        pytest.raises(InvalidInput, match=r"name is 1 to \d+ printable characters"),
    ):
        run(engine, store, tmp_path, task=name)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused_before_the_pass(tmp_path, store):
    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    with Engine.open(EngineConfig(folder, max_context=128)) as engine:
        engine.card = replace(engine.card, vocab=121)
        with pytest.raises(MismatchError, match=r"gives token \d+, and the model knows 121 tokens"):
            run(engine, store, tmp_path)
    assert list(store.profiles.list()) == list(store.tasks.list()) == []


def test_another_tokenizer_makes_another_model_whose_profiles_do_not_serve(tmp_path, store):
    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    text = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(text.replace("{", '{"model_max_length": 77, ', 1))
    with Engine.open(EngineConfig(folder, max_context=128)) as engine:
        made = run(engine, store, tmp_path)
    with Engine.open(EngineConfig(other, max_context=128)) as engine:
        assert engine.card.fingerprint != made.model
        assert store.profiles.latest(engine.card.fingerprint, "t") is None


def test_a_disk_that_fills_up_during_the_pass_leaves_no_profile_and_what_was_saved(tmp_path, store, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_AFTER", 0)
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=4)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(BudgetError, match=r"What a run has finished takes .* the disk is full"):
                run(engine, store, tmp_path)
        assert list(store.profiles.list()) == []
        assert sorted(path.suffix for path in (tmp_path / "runs").iterdir()) == [".lock", ".npz"]
        made = run(engine, store, tmp_path)  # goes on where the disk was full
        with open_store(f"sqlite:///{tmp_path}/other.db") as fresh:
            again = run(engine, fresh, tmp_path / "again")
    for name, array in made.statistics.items():
        np.testing.assert_array_equal(array, again.statistics[name], err_msg=name)


def test_two_runs_for_one_profile_at_once(tmp_path, store):
    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    with Engine.open(EngineConfig(folder, max_context=128)) as engine:
        with (
            hold(tmp_path / "runs", job.lock_name(engine.card, "t")),
            pytest.raises(Conflict, match="Another run is profiling the same task"),
        ):
            run(engine, store, tmp_path)
        assert list(store.profiles.list()) == []
        assert run(engine, store, tmp_path).task == "t"


def test_a_failure_between_draws_leaves_a_profile_that_serves_and_is_priced_by_the_next_run(
    tmp_path, store, monkeypatch
):
    from profiler import price

    def broken(*_: object) -> None:
        raise torch.OutOfMemoryError

    folder = write_tiny("olmoe", tmp_path / "m", seed=4)
    with Engine.open(EngineConfig(folder, max_context=128)) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(price, "collect", broken)
            with pytest.raises(torch.OutOfMemoryError):
                run(engine, store, tmp_path, draws=2)
        [profile] = store.profiles.list()
        assert store.evaluations.list(profile.id)
        assert list(store.prices.list(profile.id)) == []
        assert run(engine, store, tmp_path, draws=2).id == profile.id
    assert [len(one.draws) for one in store.prices.list(profile.id)] == [2]
