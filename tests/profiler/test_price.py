"""What sizes cost: the interval by hand, draws of the text, and prices in the store."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.stand_ins import DeviceStandIns
from engine.tiny import write_tiny
from profiler import gather as gather_module
from profiler import passes as passes_module
from profiler import price as price_module
from profiler import unfinished
from profiler.allocation import size_of, uniform
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.draws import draw
from profiler.gather import gather_statistics
from profiler.job import profile_task
from profiler.options import Options
from profiler.passes import collect
from profiler.price import best_by_size, interval
from profiler.progress import ignore
from profiler.run import Run
from profiler.scorers.registry import SCORERS
from profiler.stream import stream_statistics
from store.database import open_store
from store.errors import BudgetError, InvalidInput
from store.intervals import wilson
from store.records import TaskRecord

WORDS = ("red", "green", "blue", "cat", "dog", "sings", "sleeps")


def texts(seed: int, count: int):
    random = np.random.default_rng(seed)
    return gather([Item(f"{seed} {n} " + " ".join(random.choice(WORDS, 4)), "yes") for n in range(count)])


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=16)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened


@pytest.fixture
def run(engine, store, tmp_path):
    def call(others=None, into=store, **fields):
        chosen = {"scorers": ["gate", "reap", "frequency"], "keeps": (1.0, 0.5), "runs": tmp_path / "runs"}
        return profile_task(
            engine,
            into,
            TaskRecord("t"),
            texts(1, 8),
            texts(2, 6),
            embedder=HashEmbedder(),
            others=others,
            options=Options(**({"rows": 16} | chosen | fields)),
        )

    return call


def test_without_draws_the_interval_is_that_of_the_items():
    assert interval(0.9, 40) == wilson(0.9, 40)
    assert interval(0.9, 40, [0.8]) == wilson(0.9, 40)  # one draw has no spread
    assert interval(None, 40, [None, None]) == (None, None)


def test_draws_that_differ_widen_it_as_independent_errors_do():
    low, high = wilson(0.5, 40)
    found = interval(0.5, 40, [0.4, 0.5, 0.6])  # standard deviation 0.1, Student's t of two degrees
    assert found[0] == pytest.approx(max(0, 0.5 - math.hypot(0.5 - low, 0.43)))
    assert found[1] == pytest.approx(min(1, 0.5 + math.hypot(high - 0.5, 0.43)))
    assert interval(0.5, 40, [0.7] * 5) == wilson(0.5, 40)
    many = interval(0.5, 4000, [0.45, 0.55] * 10)
    assert many[1] - 0.5 == pytest.approx(math.hypot(0.0155, 1.96 * np.std([0.45, 0.55] * 10, ddof=1)), abs=2e-4)


def test_a_draw_is_a_bootstrap_by_seed_and_the_few_are_among_the_more(engine):
    text = encode_corpus(engine, texts(5, 30))
    numbers = [one.number for one in draw(text, 1)]
    assert len(numbers) == 30 > len(set(numbers)) > 10
    assert numbers == [one.number for one in draw(list(reversed(text)), 1)] != [one.number for one in draw(text, 2)]
    five, ten = ({one.number for one in draw(text, 1, count)} for count in (5, 10))
    assert (len(five), len(ten)) == (5, 10)
    assert five < ten
    with pytest.raises(InvalidInput, match="31 of 30 items"):
        draw(text, 1, 31)


def test_every_size_has_a_price_with_as_many_draws_as_were_asked_for(run, store, engine):
    made = run(draws=3, others=texts(9, 5))
    prices = store.prices.list(made.id)
    own = [one for one in prices if one.text == "own"]
    assert [store.selections.get(one.selection).keep for one in own] == [1.0, 0.5]
    assert [len(one.draws) for one in own] == [0, 3]  # all experts are all experts, whatever the text
    for one in own:
        assert one.low <= one.accuracy <= one.high
        assert one.bytes == engine.plan.bytes_of(store.selections.get(one.selection).selection)
    others = [one for one in prices if one.text == "others"]
    assert [one.items for one in others] == [5, 5]
    assert others[0].accuracy == others[0].full_accuracy
    assert not {store.selections.get(one.selection).scorer for one in own} & {"frequency", "random"}


def test_a_draw_s_figures_are_those_of_its_own_selection(run, store, engine, tmp_path):
    made = run(draws=2, keeps=(0.5,), scorers=["gate"])
    [price] = store.prices.list(made.id)
    text = encode_corpus(engine, texts(1, 8))
    items = encode_corpus(engine, texts(2, 6))
    wanted = []
    for seed in (1, 2):
        passed = gather_statistics(engine, draw(text, seed), Run(tmp_path, str(seed), ""), "t", 16, ignore)
        kept = uniform(SCORERS["gate"].score(passed), 0.5, engine.card.top_k)
        wanted.append(price_module.evaluate_forced(engine, items, kept).nll)
    assert [nll for _, nll in price.draws] == pytest.approx(wanted)
    assert len(set(wanted)) == 2


def test_prices_are_made_once_and_again_only_for_more_draws(run, store, monkeypatch):
    passes = []
    monkeypatch.setattr(price_module, "collect", lambda *given: passes.append(given) or collect(*given))
    made = run(draws=2)
    assert len(passes) == 2
    run(draws=1)
    assert len(passes) == 2
    run(draws=3)
    assert len(passes) == 5
    assert [len(one.draws) for one in store.prices.list(made.id)] == [0, 3]


def killed_in(monkeypatch, module, name, call):
    """The next run dies when it calls that function for the so-manieth time."""
    real, calls = getattr(module, name), []

    def dying(*given, **named):
        calls.append(given)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(module, name, dying)


def test_draws_that_were_measured_before_a_kill_are_not_drawn_again(run, store, monkeypatch, tmp_path):
    straight = run(draws=3)
    wanted = store.prices.list(straight.id)
    with open_store(f"sqlite:///{tmp_path}/killed.db") as other:
        killed = partial(run, into=other)
        with monkeypatch.context() as patch:
            killed_in(patch, price_module, "collect", 3)
            with pytest.raises(KeyboardInterrupt):
                killed(draws=3)
        passes = []
        monkeypatch.setattr(price_module, "collect", lambda *given: passes.append(given) or collect(*given))
        made = killed(draws=3)
        assert len(passes) == 1
        assert other.prices.list(made.id) == wanted
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".lock"]


@pytest.mark.parametrize("again", [{"rows": 8}, {"scorers": ["gate", "mone"]}])
def test_a_killed_draw_is_not_added_to_one_of_another_cut_or_with_other_sums(
    again, run, store, engine, monkeypatch, tmp_path
):
    monkeypatch.setattr(unfinished, "SAVE_AFTER", 0)
    first = {"scorers": ["gate"], "keeps": (0.5,), "rows": 2}
    run(**first)
    with monkeypatch.context() as patch:
        killed_in(patch, gather_module, "_statistics", 3)
        with pytest.raises(KeyboardInterrupt):
            run(draws=1, **first)
    [left] = (tmp_path / "runs").glob("*-draw1.npz")
    seen = []
    monkeypatch.setattr(price_module, "collect", lambda *given: seen.append((given[1], collect(*given))) or seen[-1][1])
    # As where the best selection changed in between: the draw is of the same profile.
    profile = store.profiles.latest(engine.card.fingerprint, "t")
    options = Options(**{"runs": tmp_path / "runs", **first, **again})
    stored = [replace(store.selections.find(profile.id)[0], scorer=name) for name in options.scorers]
    pricing = price_module.Pricing(encode_corpus(engine, texts(1, 8)), None, options)
    found = price_module._statistics(engine, profile, stored, pricing, 1)
    [(text, sums)] = seen
    assert sums.token_count == sum(len(one.tokens) for one in text)
    assert options.needs <= set(found.extras)
    assert not left.exists()


def test_a_draw_is_measured_with_the_mean_outputs_of_its_own_text(store, tmp_path, monkeypatch):
    folder = write_tiny("qwen3_moe", tmp_path / "m", seed=3)
    with Engine.open(EngineConfig(folder, max_context=128, max_batch=16, stand_ins=1)) as engine:
        served, measured = DeviceStandIns.vectors, []

        def watched(self, stand_in):
            measured.append((stand_in, served(self, stand_in)))
            return measured[-1][1]

        monkeypatch.setattr(DeviceStandIns, "vectors", watched)
        fields = {"scorers": ["gate"], "stand_ins": ["novice"], "draws": 2, "keeps": (0.75,)}
        options = Options(runs=tmp_path / "runs", **fields)
        task = (TaskRecord("t"), texts(1, 8), texts(2, 6))
        profile_task(engine, store, *task, embedder=HashEmbedder(), options=options)
    assert len({stand_in.id for stand_in, _ in measured}) == 3  # the profile's and two draws'
    for stand_in, vectors in measured:
        np.testing.assert_array_equal(vectors.cpu().numpy(), stand_in.vectors)


def test_a_draw_streams_where_the_profile_s_own_pass_does(run, store, monkeypatch):
    streamed = []
    monkeypatch.setattr(
        passes_module, "stream_statistics", lambda *given: streamed.append(given) or stream_statistics(*given)
    )
    made = run(draws=1, stream=True, scorers=["gate"], keeps=(0.5,))
    assert len(streamed) == 2  # the profile's and the draw's
    assert [len(one.draws) for one in store.prices.list(made.id)] == [1]


def test_items_of_others_may_not_be_calibration_text(run):
    with pytest.raises(InvalidInput, match="are calibration items"):
        run(others=texts(1, 3))


def test_a_size_in_bytes_keeps_as_many_bytes_and_says_which_share_that_is(run, store, engine):
    slot, experts = engine.plan.slot_bytes, engine.card.layers * engine.card.experts
    made = run(keeps=(0.5,), budgets=(15 * slot + 7,), scorers=["gate"], allocators=["uniform", "global"])
    found = {one.allocator: one for one in store.selections.find(made.id) if one.id.endswith(f"{15 * slot + 7}B")}
    assert len(found["global"].selection) == 15
    assert len(found["uniform"].selection) == 15 // engine.card.layers * engine.card.layers
    assert {one.keep for one in found.values()} == {(15 * slot + 7) / (experts * slot)}
    assert len(store.prices.list(made.id)) == 2  # one a size


def test_bytes_below_the_floor_and_above_memory_are_refused_before_anything_runs(run, engine):
    slot = engine.plan.slot_bytes
    for size in (slot, (engine.plan.slots + 1) * slot):
        with pytest.raises(BudgetError, match="Ask for a size in between"):
            run(budgets=(size,))


def test_sizes_are_shares_or_bytes():
    assert [size_of(text) for text in ("0.25", "1", "2MiB", "1kB")] == [0.25, 1.0, 2 << 20, 1000]
    for wrong in ("0", "1.5", "half", "2G", "nan"):
        with pytest.raises(InvalidInput):
            size_of(wrong)


def test_the_best_of_a_size_is_what_the_service_would_choose(run, store, engine):
    made = run(scorers=["gate", "reap", "man", "random"])
    held = price_module.HeldOut([], texts(2, 6).content_hash, 1)
    [whole, half] = best_by_size(store, made, held)
    rivals = [
        (-(evidence.accuracy or 0), evidence.nll, stored.id)
        for stored, evidence in store.evaluations.list(made.id)
        if stored.keep == 0.5 and stored.scorer != "random"
    ]
    assert half[0].id == min(rivals)[2]
    assert whole[0].keep == 1.0
    assert best_by_size(store, made, replace(held, content_hash="other")) == []
