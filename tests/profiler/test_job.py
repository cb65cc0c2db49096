"""The job on a tiny real model and a real store: what it writes and refuses, and that a killed run loses nothing."""

from __future__ import annotations

import itertools
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from engine.tiny import write_tiny
from profiler import evidence
from profiler.allocators import PLAIN
from profiler.corpus import Corpus, Item, gather
from profiler.doubts import judge
from profiler.evaluate import evaluate
from profiler.extras import EXTRAS
from profiler.generalist import profile_generalist
from profiler.job import profile_task
from profiler.options import Options
from profiler.run import hold
from profiler.scorers.registry import DEFAULTS, SCORERS
from profiler.statistics import Statistics
from store.database import open_store
from store.errors import BudgetError, CheckpointError, Conflict, InvalidInput, NotFound
from store.records import TaskRecord

WORDS = ["red", "green", "blue", "one", "two", "cat", "dog", "bird", "sings", "sleeps", "on", "under", "near", "the"]


def texts(seed: int, count: int) -> Corpus:
    draw = np.random.default_rng(seed)
    made = [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(4 * count)]
    return gather([Item(f"{seed} {text}", text.upper()[:12], line=line) for line, text in enumerate(made, 1)][:count])


@pytest.fixture
def options(tmp_path) -> Options:
    return Options(rows=4, runs=tmp_path / "runs")


@pytest.fixture
def passes(engine, monkeypatch) -> list[int]:
    """Counts the rows of every forward, of the pass and of the evaluation."""
    rows: list[int] = []
    whole = engine.passes.whole

    def counted(ids, *arguments, **more):
        rows.append(len(ids))
        return whole(ids, *arguments, **more)

    monkeypatch.setattr(engine.passes, "whole", counted)
    return rows


def test_a_profile_comes_with_its_provenance_selections_and_evidence(engine, store, options):
    calibration, evaluation = texts(1, 10), texts(2, 5)
    steps = []
    made = profile_task(
        engine, store, TaskRecord("words", "upper case"), calibration, evaluation,
        embedder=HashEmbedder(), options=options, report=steps.append,
    )  # fmt: skip
    found = store.profiles.latest(engine.card.fingerprint, "words")
    assert found is not None
    assert (found.id, found.calibration_hash) == (made.id, calibration.content_hash)
    assert found.calibration_items == calibration.item_hashes
    encode = engine.tokenizer.encode
    template = len(engine.tokenizer.encode_chat([{"role": "user", "content": ""}]))
    tokens = sum(len(encode(item.prompt)) + template + len(encode(item.response)) for item in calibration.items)
    assert found.tokens == tokens
    assert found.trust == judge(Statistics.from_arrays(found.statistics), tokens) == made.trust
    assert store.tasks.get("words").description == "upper case"
    assert store.models.get(engine.card.fingerprint).top_k == engine.card.top_k
    pairs = store.evaluations.list(made.id)
    assert {(stored.scorer, stored.keep) for stored, _ in pairs} == set(itertools.product(DEFAULTS, options.keeps))
    for stored, measured in pairs:
        assert measured.items == 5
        assert measured.evaluation_hash == evaluation.content_hash
        assert 0 < measured.nll < 20
        assert measured.coverage == 1.0 if stored.keep == 1.0 else 0 < measured.coverage < 1
        assert len(measured.levels) == 5
        assert measured.levels == (1.0,) * 5 if stored.keep == 1.0 else 0 < measured.levels[0] < measured.levels[-1] < 1
        assert [len(ids) for ids in stored.selection.experts] == [max(2, int(8 * stored.keep))] * 3
    assert [(step.done, step.total) for step in steps if step.stage == "calibrate"] == [
        (0, 10),
        (4, 10),
        (8, 10),
        (10, 10),
    ]
    assert [path.suffix for path in options.folder.iterdir()] == [".lock"]  # the partial sums are no longer needed


def test_every_scorers_selection_is_the_top_of_its_own_scores(engine, store, options):
    made = profile_task(engine, store, TaskRecord("t"), texts(1, 6), None, embedder=HashEmbedder(), options=options)
    statistics = Statistics.from_arrays(store.profiles.get(made.id).statistics)
    for stored in store.selections.find(made.id, keep=0.5):
        scores = SCORERS[stored.scorer].score(statistics)
        for layer, ids in enumerate(stored.selection.experts):
            left = set(range(8)) - set(ids)
            assert min(scores[layer, list(ids)]) >= max(scores[layer, list(left)])
    assert store.evaluations.list(made.id) == []


def test_exemplars_are_prompts_spread_over_the_text_as_unit_vectors(engine, store, options):
    calibration = texts(1, 10)
    chosen = Options(rows=4, runs=options.runs, exemplars=4)
    profile_task(engine, store, TaskRecord("t"), calibration, None, embedder=HashEmbedder(), options=chosen)
    exemplars = store.exemplars.list(embedder=HashEmbedder().id, task="t")
    assert [one.text for one in exemplars] == [calibration.items[i].prompt for i in (0, 2, 5, 7)]
    np.testing.assert_array_equal(exemplars[1].vector, HashEmbedder().embed([exemplars[1].text])[0])


def test_profiling_again_changes_nothing_and_runs_nothing(engine, store, options, passes):
    arguments = (engine, store, TaskRecord("t"), texts(1, 6), texts(2, 3))
    first = profile_task(*arguments, embedder=HashEmbedder(), options=options)
    before = store.evaluations.list(first.id)
    passes.clear()
    again = profile_task(*arguments, embedder=HashEmbedder(), options=options)
    assert (again.id, again.created) == (first.id, first.created)
    assert store.evaluations.list(first.id) == before
    assert passes == []


def test_evidence_that_was_made_before_the_guard_is_measured_again(engine, store, options):
    arguments = (engine, store, TaskRecord("t"), texts(1, 6), texts(2, 3))
    made = profile_task(*arguments, embedder=HashEmbedder(), options=options)
    before = store.evaluations.list(made.id)
    for _, evaluation in before:
        store.evaluations.put(replace(evaluation, levels=()))
    profile_task(*arguments, embedder=HashEmbedder(), options=options)
    assert store.evaluations.list(made.id) == before


def test_another_scorer_later_needs_no_second_pass_over_the_calibration(engine, store, options, passes):
    def run(scorer: str) -> str:
        chosen = Options(scorers=[scorer], keeps=(0.5,), rows=4, runs=options.runs)
        return profile_task(
            engine, store, TaskRecord("t"), texts(1, 8), texts(2, 3), embedder=HashEmbedder(), options=chosen
        ).id

    first = run("reap")
    assert sum(passes) == 8 + 3 + 3  # the text, the whole model, one selection
    passes.clear()
    assert run("peu") == first
    assert sum(passes) == 3 + 3
    assert {stored.scorer for stored in store.selections.find(first)} == {"reap", "peu"}


def test_layers_of_different_sizes_are_stored_measured_and_generate(engine, store, options):
    """The engine answers inside the odd ones, and they take no more slots than uniform ones."""
    chosen = Options(scorers=["easy_ep"], allocators=list(PLAIN), keeps=(1.0, 0.5), rows=4, runs=options.runs)
    made = profile_task(
        engine, store, TaskRecord("t"), texts(1, 8), texts(2, 3), embedder=HashEmbedder(), options=chosen
    )
    pairs = store.evaluations.list(made.id)
    assert {(stored.allocator, stored.keep) for stored, _ in pairs} == set(itertools.product(PLAIN, (1.0, 0.5)))
    odd = [stored for stored, _ in pairs if len({len(ids) for ids in stored.selection.experts}) > 1]
    assert odd
    for stored in odd:
        assert engine.plan.fits(stored.selection)
        assert len(stored.selection) == 12
        request = GenerationRequest((5, 6, 7), stored.selection, "mask", Sampling(max_tokens=3))
        [end] = [event for event in engine.generate([request]) if isinstance(event, FinishedEvent)]
        assert end.served.experts == 12
        assert 0 < end.served.coverage < 1


def test_selections_of_the_same_experts_are_measured_once(engine, store, options, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return evaluate(*arguments)

    monkeypatch.setattr(evidence, "evaluate", counted)
    chosen = Options(scorers=["gate", "random"], allocators=list(PLAIN), keeps=(1.0, 0.5), rows=4, runs=options.runs)
    made = profile_task(
        engine, store, TaskRecord("t"), texts(1, 8), texts(2, 3), embedder=HashEmbedder(), options=chosen
    )
    pairs = store.evaluations.list(made.id)
    assert len(pairs) == 2 * 2 * len(PLAIN)
    assert len(calls) == len({stored.selection for stored, _ in pairs})
    found = {stored.selection: measured.nll for stored, measured in pairs}
    assert all(measured.nll == found[stored.selection] for stored, measured in pairs)


def test_a_scorer_of_an_extra_costs_a_pass_once_and_the_profile_grows(engine, store, options, passes):
    def run(*scorers: str) -> str:
        chosen = Options(scorers=scorers or None, keeps=(0.5,), rows=4, runs=options.runs)
        return profile_task(
            engine, store, TaskRecord("t"), texts(1, 8), None, embedder=HashEmbedder(), options=chosen
        ).id

    plain = run()
    assert (run("mone", "reap"), sum(passes)) != (plain, 8)
    rich = store.profiles.latest(engine.card.fingerprint, "t")
    assert set(rich.statistics) & set(EXTRAS) == {"output_sums"}
    assert run("stun") != rich.id
    richest = store.profiles.latest(engine.card.fingerprint, "t")
    assert set(richest.statistics) & set(EXTRAS) == {"output_sums", "coactivations"}
    assert {"mone", "stun", "reap"} <= set(richest.scorers)
    assert "stun_router" not in richest.scorers
    passes.clear()
    assert run() == run("mone_mean") == richest.id  # what serves is the youngest: it takes the new selections
    assert passes == []


def test_a_profile_that_grows_keeps_what_it_serves_with_its_evidence_and_prices(engine, store, options):
    def run(scorers: list[str], keeps: tuple[float, ...], **fields):
        chosen = Options(scorers=scorers, keeps=keeps, runs=options.runs, **fields)
        arguments = (engine, store, TaskRecord("t"), texts(1, 8), texts(2, 4))
        return profile_task(*arguments, embedder=HashEmbedder(), options=chosen)

    def said(profile: str):
        evaluations = {
            (one.scorer, one.keep): (one.selection, replace(evidence, selection=""))
            for one, evidence in store.evaluations.list(profile)
        }
        names = {one.id: (one.scorer, one.keep) for one in store.selections.find(profile)}
        return evaluations, {names[one.selection]: replace(one, selection="") for one in store.prices.list(profile)}

    old = run(["gate", "reap", "peu"], (0.5, 0.25), rows=4, draws=1)
    before = said(old.id)
    assert (len(before[0]), len(before[1])) == (6, 2)
    new = run(["mone_mean"], (0.5,), rows=3)  # in other batches: the sums would be others in the last bit
    serves = store.profiles.latest(engine.card.fingerprint, "t", proven=True)
    assert serves.id == new.id != old.id
    after = said(new.id)
    assert after[0].keys() == before[0].keys() | {("mone_mean", 0.5)}
    assert before[0].items() <= after[0].items()
    assert before[1].items() <= after[1].items()
    for name, array in old.statistics.items():
        np.testing.assert_array_equal(new.statistics[name], array)
    assert run(["gate", "reap", "peu"], (0.5, 0.25), rows=5).id == new.id  # the same experts under the same ids
    assert said(old.id) == before


def test_profiling_again_without_a_description_leaves_the_one_there_is(engine, store, options):
    for said, kept in (("About cats.", "About cats."), ("", "About cats."), ("About dogs.", "About dogs.")):
        task = TaskRecord("t", said)
        profile_task(engine, store, task, texts(1, 8), None, embedder=HashEmbedder(), options=options)
        assert store.tasks.get("t").description == kept


def test_the_generalist_refuses_scorers_that_a_task_was_not_profiled_for(engine, store, options):
    arguments = (engine, store, TaskRecord("t"), texts(1, 4), None)
    profile_task(*arguments, embedder=HashEmbedder(), options=options)
    chosen = Options(scorers=["mone"], rows=4, runs=options.runs)
    with pytest.raises(InvalidInput, match="task 't' was made without the statistic output_sums"):
        profile_generalist(engine, store, None, options=chosen)
    profile_task(*arguments, embedder=HashEmbedder(), options=chosen)
    assert profile_generalist(engine, store, None, options=chosen).scorers["mone"] == "1"


def test_a_profile_by_router_growth_names_its_base(engine, store, options, model, tmp_path):
    chosen = Options(scorers=["router_growth"], rows=4, runs=options.runs)
    with pytest.raises(InvalidInput, match="with --base"):
        profile_task(engine, store, TaskRecord("t"), texts(1, 4), None, embedder=HashEmbedder(), options=chosen)
    ids = set()
    for seed in (5, 6):
        base = write_tiny("qwen2_moe", tmp_path / f"base{seed}", seed=seed)
        tuned = Options(scorers=["router_growth"], rows=4, runs=options.runs, base=base)
        made = profile_task(engine, store, TaskRecord("t"), texts(1, 4), None, embedder=HashEmbedder(), options=tuned)
        ids.add(made.id)
        assert made.statistics["router_growth"].shape == (3, 8)
    assert len(ids) == 2


def test_interrupted_evaluations_go_on_with_the_selection_they_stopped_at(engine, store, options, monkeypatch):
    def run() -> str:
        return profile_task(
            engine, store, TaskRecord("t"), texts(1, 4), texts(2, 3), embedder=HashEmbedder(), options=options
        ).id

    def stop_after(count: int) -> None:
        calls = iter(range(count))

        def measured(*arguments):
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return evaluate(*arguments)

        monkeypatch.setattr(evidence, "evaluate", measured)

    stop_after(3)
    with pytest.raises(KeyboardInterrupt):
        run()
    [profile] = store.profiles.list()
    done = store.evaluations.list(profile.id)
    # The whole model, tcess at 0.5 and at 0.25, which are the same two experts at 0.125; peu at 1 is the whole model.
    assert len(done) == 5
    stop_after(1 + 2 * 6)  # the whole model again, and two sizes of the six other scorers
    assert run() == profile.id
    assert len(store.evaluations.list(profile.id)) == 28
    assert store.evaluations.list(profile.id)[-4:][0][0].scorer == "tcess"


def test_a_few_slots_give_the_same_bits_as_all_of_them(model, engine, store, options, tmp_path):
    whole = profile_task(engine, store, TaskRecord("t"), texts(1, 6), None, embedder=HashEmbedder(), options=options)
    lean = EngineConfig(model, max_context=128, max_batch=8, chunk_tokens=512)
    with Engine.open(EngineConfig(model, memory=1 << 40, max_context=128, max_batch=8, chunk_tokens=512)) as roomy:
        floor = roomy.plan.floor_bytes
    few = EngineConfig(lean.model, memory=floor, max_context=128, max_batch=8, chunk_tokens=512)
    small = Options(rows=4, runs=options.runs, keeps=(1.0,))
    with Engine.open(few) as paged, open_store(f"sqlite:///{tmp_path}/other.db") as other:
        assert paged.plan.slots < paged.card.layers * paged.card.experts
        made = profile_task(paged, other, TaskRecord("t"), texts(1, 6), None, embedder=HashEmbedder(), options=small)
        with pytest.raises(BudgetError, match=r"Keeping 0\.5 of the experts takes 12 slots"):
            profile_task(
                paged, other, TaskRecord("t"), texts(1, 6), None,
                embedder=HashEmbedder(), options=Options(runs=options.runs, keeps=(1.0, 0.5)),
            )  # fmt: skip
    for name, array in whole.statistics.items():
        assert array.tobytes() == made.statistics[name].tobytes(), name


def test_what_can_be_refused_is_refused_before_any_forward(engine, store, options, passes):
    def run(task="t", calibration=None, evaluation=None, chosen=options) -> None:
        text = calibration or texts(1, 4)
        profile_task(engine, store, TaskRecord(task), text, evaluation, embedder=HashEmbedder(), options=chosen)

    with pytest.raises(InvalidInput, match="2 of 3 items of memory are calibration items"):
        run(evaluation=gather([*texts(1, 4).items[:2], Item("new")]))
    with pytest.raises(InvalidInput, match=r"line 9: \d+ tokens, the limit is 128\. Shorten the item, or raise"):
        run(calibration=gather([Item("long " * 40, line=9)]))
    with pytest.raises(InvalidInput, match="'generalist' stands for all tasks"):
        run(task="generalist")
    with pytest.raises(InvalidInput, match="no scorer 'magic'"):
        run(chosen=Options(scorers=["magic"]))
    with pytest.raises(InvalidInput, match="no allocator 'most'"):
        run(chosen=Options(allocators=["most"]))
    for keeps, message in [((), "at least one share"), ((1.5,), r"must lie in \(0, 1\], got 1.5")]:
        with pytest.raises(InvalidInput, match=message):
            run(chosen=Options(keeps=keeps))
    assert passes == []
    assert store.profiles.list() == []
    assert store.tasks.list() == []


def test_a_second_run_of_the_same_task_is_refused_and_writes_nothing(engine, store, options):
    def second(step) -> None:
        with pytest.raises(Conflict, match="Another run is profiling the same task"):
            profile_task(engine, store, TaskRecord("t"), texts(3, 4), None, embedder=HashEmbedder(), options=options)
        assert store.profiles.list() == []

    profile_task(
        engine, store, TaskRecord("t"), texts(1, 4), None, embedder=HashEmbedder(), options=options, report=second
    )
    assert len(store.profiles.list()) == 1


def test_weights_that_are_not_numbers_are_refused_and_leave_nothing(tmp_path, store, options):
    folder = write_tiny("qwen2_moe", tmp_path / "broken", seed=3)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for expert in range(8):
        weights[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].fill_(torch.nan)
    save_file(weights, file, metadata={"format": "pt"})
    with Engine.open(EngineConfig(folder, max_context=128)) as broken:
        with pytest.raises(CheckpointError, match="expert outputs of MoE layer 1 are not finite"):
            profile_task(broken, store, TaskRecord("t"), texts(1, 4), None, embedder=HashEmbedder(), options=options)
        assert store.profiles.list() == store.tasks.list() == []
        with hold(options.folder, "free"):
            pass


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from profiler import unfinished
from profiler.corpus import read_corpus
from profiler.job import profile_task
from profiler.options import Options
from store.database import open_store
from store.records import TaskRecord
folder, model, url, die_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
seen = []
unfinished.SAVE_AFTER = 0
def report(step):
    seen.append(step)
    if step.stage == "calibrate" and len(seen) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
with open_store(url) as store, Engine.open(EngineConfig(model, max_context=128, threads=1)) as engine:
    made = profile_task(engine, store, TaskRecord("t"), read_corpus(folder / "calibration.jsonl"), None,
        embedder=HashEmbedder(), options=Options(rows=2, runs=folder / "runs"), report=report)
print(json.dumps({"id": made.id, "first": seen[0].done}))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(model, tmp_path):
    lines = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in texts(1, 9).items]
    (tmp_path / "calibration.jsonl").write_text("\n".join(lines))
    interrupted, straight = f"sqlite:///{tmp_path}/interrupted.db", f"sqlite:///{tmp_path}/straight.db"

    def run(url: str, die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(model), url, str(die_at)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run(interrupted, die_at=4).returncode == -9
    with open_store(interrupted) as store:
        assert store.profiles.list() == store.tasks.list() == []
    resumed = run(interrupted, die_at=0)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["first"] == 6  # three shards of two items were done
    whole = run(straight, die_at=0)
    assert json.loads(whole.stdout)["first"] == 0
    with open_store(interrupted) as one, open_store(straight) as other:
        [left], [right] = one.profiles.list(), other.profiles.list()
    assert left.id == right.id == json.loads(whole.stdout)["id"]
    for name, array in left.statistics.items():
        assert array.tobytes() == right.statistics[name].tobytes(), name


def test_the_generalist_is_the_balanced_mean_of_all_tasks(engine, store, options, monkeypatch):
    monkeypatch.setattr("profiler.doubts.FEW_TOKENS", 10**6)  # so that both parts are doubted
    parts = [
        profile_task(
            engine, store, TaskRecord(f"t{n}"), texts(n, 3 * n), None, embedder=HashEmbedder(), options=options
        )
        for n in (1, 2)
    ]
    made = profile_generalist(engine, store, texts(7, 4), options=options)
    found = store.profiles.latest(engine.card.fingerprint, "generalist")
    assert found is not None
    assert found.tokens == sum(part.tokens for part in parts)
    assert found.calibration_items == parts[0].calibration_items | parts[1].calibration_items
    gates = [Statistics.from_arrays(part.statistics).total("gates") / part.tokens for part in parts]
    np.testing.assert_allclose(Statistics.from_arrays(found.statistics).total("gates"), np.mean(gates, axis=0))
    assert found.trust == made.trust
    assert all(part.doubts for part in parts)
    assert made.doubts[-1] == "It is the mean of 2 profiles, of which 2 are doubted themselves; see their tasks."
    assert len(store.evaluations.list(made.id)) == 28
    assert profile_generalist(engine, store, texts(7, 4), options=options).created == made.created


def test_a_profile_that_nobody_judged_is_judged_by_the_next_run_without_a_forward(
    engine, store, options, tmp_path, passes
):
    def run():
        return profile_task(engine, store, TaskRecord("t"), texts(1, 3), None, embedder=HashEmbedder(), options=options)

    made = run()
    with closing(sqlite3.connect(tmp_path / "store.db")) as database, database:
        database.execute("DELETE FROM trust")
    assert store.profiles.get(made.id).trust is None
    passes.clear()
    assert run().trust == store.profiles.get(made.id).trust == made.trust
    assert passes == []


def test_a_generalist_of_nothing_or_judged_by_seen_text_is_refused(engine, store, options):
    with pytest.raises(NotFound, match="No task of this model is profiled"):
        profile_generalist(engine, store, None, options=options)
    profile_task(engine, store, TaskRecord("t"), texts(1, 3), None, embedder=HashEmbedder(), options=options)
    with pytest.raises(InvalidInput, match=r"3 of 3 evaluation items are calibration items of a task: .* seen by 't'"):
        profile_generalist(engine, store, texts(1, 3), options=options)


def test_profiles_made_of_other_text_or_models_have_other_ids(engine, store, options):
    ids = {
        profile_task(engine, store, TaskRecord(task), text, None, embedder=HashEmbedder(), options=options).id
        for task, text in [("a", texts(1, 3)), ("b", texts(1, 3)), ("a", texts(2, 3))]
    }
    assert len(ids) == 3
