"""The pass layer by layer against the pass of the whole model, and what interrupts it."""

from __future__ import annotations

import errno
import os
from functools import partial

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import FAMILIES, write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.extras import EXTRAS
from profiler.gather import gather_statistics
from profiler.job import profile_task
from profiler.options import Options
from profiler.passes import Wanted, collect
from profiler.progress import ignore
from profiler.run import Run
from profiler.spill import Spill
from profiler.stream import pays, stream_statistics
from store.database import open_store
from store.errors import BudgetError
from store.records import TaskRecord

NEEDS = frozenset(name for name, extra in EXTRAS.items() if extra.summed)
CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes" * (1 + n % 3)) for n in range(11)])


def lean(folder, layers_resident=1.0, **fields) -> EngineConfig:
    """A budget that holds `layers_resident` layers' experts (but what one token needs in any case)."""
    config = EngineConfig(folder, memory=1 << 40, max_context=128, max_batch=8, chunk_tokens=512, **fields)
    with Engine.open(config) as engine:
        plan, card = engine.plan, engine.card
    slots = max(card.layers * card.top_k, round(layers_resident * card.experts))
    return EngineConfig(
        folder,
        memory=plan.fixed_bytes + slots * plan.slot_bytes,
        max_context=128,
        max_batch=8,
        chunk_tokens=512,
        **fields,
    )


def assert_same(left, right) -> None:
    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_equal_those_of_the_whole_model_and_every_expert_is_read_once(family, tmp_path):
    config = lean(write_tiny(family, tmp_path / "m", seed=11))
    with Engine.open(config) as engine:
        card = engine.card
        assert card.experts <= engine.plan.slots < card.layers * card.experts
        text = encode_corpus(engine, CORPUS)
        assert pays(engine, text, 2)
        streamed = stream_statistics(engine, text, Run(tmp_path / "s", "p", ""), "t", 2, ignore, NEEDS)
        hit = int((streamed.total("selected") > 0).sum())
        assert engine.residency().experts_paged == hit
        whole = gather_statistics(engine, text, Run(tmp_path / "w", "p", ""), "t", 2, ignore, NEEDS)
        assert engine.residency().experts_paged > 2 * hit
    assert_same(streamed, whole)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["p.npz"]


def test_half_precision_states_are_carried_without_loss(tmp_path):
    folder = write_tiny("qwen3_moe", tmp_path / "m", seed=1)
    with Engine.open(lean(folder, dtype="bfloat16")) as engine:
        text = encode_corpus(engine, CORPUS)
        streamed = stream_statistics(engine, text, Run(tmp_path / "s", "p", ""), "t", 2, ignore)
        assert_same(streamed, gather_statistics(engine, text, Run(tmp_path / "w", "p", ""), "t", 2, ignore))


@pytest.mark.parametrize("die_at", [1, 2, 3])
def test_a_run_that_is_stopped_goes_on_after_its_last_finished_layer(die_at, tmp_path):
    """Layer 0 of DeepSeek has no experts; the run is stopped in the report before layer `die_at`, or at the end."""

    def run(folder, stop=None) -> tuple[list[int], object]:
        seen = []

        def report(step) -> None:
            seen.append(step.done)
            if len(seen) - 1 == stop:
                raise KeyboardInterrupt

        with Engine.open(config) as engine:
            text = encode_corpus(engine, CORPUS)
            return seen, stream_statistics(engine, text, Run(folder, "p", ""), "t", 2, report, NEEDS)

    config = lean(write_tiny("deepseek_v3", tmp_path / "m", seed=2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", stop=die_at)
    seen, resumed = run(tmp_path / "a")
    assert seen == [11 * layer // 3 for layer in range(die_at, 3)] + [11]
    _, straight = run(tmp_path / "b")
    for name, array in resumed.arrays.items():
        assert array.tobytes() == straight.arrays[name].tobytes(), name


def test_what_a_run_in_another_precision_left_is_not_gone_on_with(tmp_path, monkeypatch):
    folder, options = write_tiny("olmoe", tmp_path / "m", seed=4), Options(rows=4, runs=tmp_path / "runs", stream=True)

    def summed(dtype: str, options: Options):
        with Engine.open(EngineConfig(folder, max_context=128, max_batch=8, dtype=dtype)) as engine:
            wanted = Wanted("one", "t", frozenset(), {})
            return collect(engine, encode_corpus(engine, CORPUS), "one", wanted, options, ignore)

    def stopped(*_, **__):
        raise KeyboardInterrupt  # no signal: a shell may have told what it runs in the background to ignore them

    with monkeypatch.context() as patch:
        patch.setattr(Spill, "forget", stopped)
        with pytest.raises(KeyboardInterrupt):
            summed("bfloat16", options)
    assert list((tmp_path / "runs").glob("one.npz"))
    fresh = summed("float16", Options(rows=4, runs=tmp_path / "other", stream=True))
    assert_same(summed("float16", options), fresh)


def test_lost_states_cost_work_and_nothing_else(tmp_path):
    config = lean(write_tiny("olmoe", tmp_path / "m", seed=2))
    calls = iter([False, False, True])

    def report(step) -> None:
        if next(calls, False):
            raise KeyboardInterrupt

    with Engine.open(config) as engine:
        text = encode_corpus(engine, CORPUS)
        with pytest.raises(KeyboardInterrupt):
            stream_statistics(engine, text, Run(tmp_path / "a", "p", ""), "t", 2, report)
        [spilled] = (tmp_path / "a").glob("*.layer*")
        spilled.write_bytes(spilled.read_bytes()[:-1])
        again = stream_statistics(engine, text, Run(tmp_path / "a", "p", ""), "t", 2, ignore)
        assert_same(again, gather_statistics(engine, text, Run(tmp_path / "w", "p", ""), "t", 2, ignore))


def test_a_full_disk_is_a_refusal_with_the_numbers_and_leaves_no_half_file(tmp_path, monkeypatch):
    config = lean(write_tiny("olmoe", tmp_path / "m", seed=2))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Engine.open(config) as engine:
        text = encode_corpus(engine, CORPUS)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(BudgetError, match=r"hidden states of the calibration text take .* the disk is full"):
                stream_statistics(engine, text, Run(tmp_path / "a", "p", ""), "t", 2, ignore)
        assert list((tmp_path / "a").iterdir()) == []
        stream_statistics(engine, text, Run(tmp_path / "a", "p", ""), "t", 2, ignore)


def test_the_job_streams_by_itself_where_the_model_does_not_fit(tmp_path, monkeypatch):
    folder = write_tiny("mixtral", tmp_path / "m", seed=4)

    def profile(config, name, **chosen):
        options = Options(keeps=(0.25,), rows=2, runs=tmp_path / name, **chosen)
        with Engine.open(config) as engine, open_store(f"sqlite:///{tmp_path}/{name}.db") as store:
            layers = []
            for way in ("forward", "to_the_end"):
                inner = getattr(engine.layers, way)
                seen = partial(lambda inner, *each: layers.append(each[0]) or inner(*each), inner)
                monkeypatch.setattr(engine.layers, way, seen)
            made = profile_task(engine, store, TaskRecord("t"), CORPUS, None, embedder=HashEmbedder(), options=options)
        return made, sorted(set(layers))

    small, large = lean(folder), EngineConfig(folder, max_context=128, max_batch=8, chunk_tokens=512)
    streamed, layers = profile(small, "small")
    assert layers == [0, 1, 2]
    whole, none = profile(large, "large")
    forced, all_layers = profile(large, "forced", stream=True)
    refused, nothing = profile(small, "refused", stream=False)
    assert (none, all_layers, nothing) == ([], [0, 1, 2], [])
    assert streamed.id == whole.id == forced.id == refused.id
    for name, array in whole.statistics.items():
        for other in (streamed, forced, refused):
            np.testing.assert_allclose(other.statistics[name], array, rtol=1e-9, atol=1e-9, err_msg=name)
