"""A text profiled in parts: the sum is that of the whole, whoever made which part how often."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Corpus, Item, gather
from profiler.extras import EXTRAS
from profiler.job import profile_task
from profiler.options import Options
from profiler.parts import Part, profile_part, run_of
from profiler.passes import want
from profiler.progress import ignore
from store.database import open_store
from store.errors import Conflict, InvalidInput, NotFound, PartsMissing
from store.records import Profile, TaskRecord

SUMMED = frozenset(name for name, extra in EXTRAS.items() if extra.summed)


def text(seed: int, count: int) -> Corpus:
    draw = np.random.default_rng(seed)
    return gather(
        [Item(f"{seed} {n} " + "and more " * int(draw.integers(0, 5)), "yes" * (1 + n % 3)) for n in range(count)]
    )


@pytest.fixture
def options(tmp_path) -> Options:
    """Parts are taken where there are any, as the command does."""
    return Options(rows=2, runs=tmp_path / "runs", merge=None)


@pytest.fixture
def passes(engine, monkeypatch) -> list[int]:
    """Counts the rows of every forward."""
    rows: list[int] = []
    inner = engine.passes.whole
    monkeypatch.setattr(
        engine.passes, "whole", lambda ids, *rest, **more: rows.append(len(ids)) or inner(ids, *rest, **more)
    )
    return rows


def whole(engine, store, calibration: Corpus, options: Options, task: str = "t") -> Profile:
    return profile_task(engine, store, TaskRecord(task), calibration, None, embedder=HashEmbedder(), options=options)


def part(engine, store, calibration: Corpus, number: int, of: int, options: Options, task: str = "t", report=ignore):
    return profile_part(engine, store, task, calibration, Part(number, of), options, report)


def assert_same(left: Profile, right: Profile) -> None:
    """To float32's rounding, since other rows run together; a share on the edge of a bin may fall to its neighbour."""
    assert left.statistics.keys() == right.statistics.keys()
    for name in left.statistics:
        one, other = (np.asarray(each.statistics[name], np.float64) for each in (left, right))
        if name == "utility":
            one, other = one.sum(axis=-1), other.sum(axis=-1)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("of", [1, 3, 11])
@pytest.mark.parametrize("scorers", [None, ["reap", "uncurl", "mone", "naee", "stun_router"]])
def test_all_parts_together_are_the_profile_of_the_whole_text(of, scorers, engine, store, options, tmp_path):
    """To rounding, under the same id; halves and roles, sums, maxima, and what does not add up and is computed once."""
    options = replace(options, scorers=scorers, extras=SUMMED if scorers else frozenset())
    calibration = text(1, 11)
    made = [part(engine, store, calibration, number, of, options) for number in range(1, of + 1)]
    assert sum(one.items for one in made) == 11
    assert [len(one.missing) for one in made] == list(range(of - 1, -1, -1))
    assert store.profiles.list() == store.tasks.list() == []
    merged = whole(engine, store, calibration, options)
    with open_store(f"sqlite:///{tmp_path}/other.db") as other:
        straight = whole(engine, other, calibration, replace(options, merge=False))
        kept = {one.id for one in other.selections.find(straight.id)}
    assert (merged.id, merged.tokens, merged.scorers) == (straight.id, straight.tokens, straight.scorers)
    assert_same(merged, straight)
    assert {one.id for one in store.selections.find(merged.id)} == kept
    assert list(store.parts.runs()) == []  # they only served to make it
    assert [path.suffix for path in options.folder.iterdir() if path.suffix != ".lock"] == []


def test_a_merge_runs_no_pass_and_a_part_that_is_there_runs_none_again(engine, store, options, passes):
    calibration = text(2, 6)
    first = part(engine, store, calibration, 1, 2, options)
    before = len(passes)
    again = part(engine, store, calibration, 1, 2, options)
    assert (first.computed, again.computed) == (True, False)
    assert again.missing == first.missing == (Part(2, 2),)
    assert len(passes) == before
    part(engine, store, calibration, 2, 2, options)
    assert sum(passes) == 6
    profile = whole(engine, store, calibration, options)
    late = part(engine, store, calibration, 2, 2, options)  # the profile is there, so is the part
    assert (late.computed, late.missing) == (False, ())
    assert whole(engine, store, calibration, replace(options, merge=True)).created == profile.created
    assert sum(passes) == 6
    assert list(store.parts.runs()) == []


def test_what_is_missing_is_named_and_nothing_is_stored(engine, store, options, passes):
    calibration = text(3, 8)
    for number in (1, 3):
        part(engine, store, calibration, number, 4, options)
    part(engine, store, calibration, 1, 3, options)  # a cut that somebody gave up
    rows = sum(passes)
    for merge in (None, True):
        with pytest.raises(
            PartsMissing, match="Of the 4 parts of this text of 't' these are missing: 2/4, 4/4"
        ) as refused:
            whole(engine, store, calibration, replace(options, merge=merge))
        assert refused.value.parts == ("2/4", "4/4")
    assert store.profiles.list() == []
    assert sum(passes) == rows
    whole(engine, store, calibration, replace(options, merge=False))
    assert sum(passes) == rows + 8
    assert list(store.parts.runs()) == []


def test_parts_of_another_text_model_precision_or_task_do_not_count(engine, store, options, tmp_path):
    calibration = text(4, 6)
    part(engine, store, text(5, 6), 2, 2, options)
    part(engine, store, calibration, 2, 2, options, task="other")
    part(engine, store, calibration, 2, 2, replace(options, extras=frozenset({"output_sums"})))
    other = write_tiny("qwen2_moe", tmp_path / "other", seed=4)
    with Engine.open(EngineConfig(other, max_context=128)) as stranger:
        part(stranger, store, calibration, 2, 2, options)
    with Engine.open(EngineConfig(engine.card.folder, max_context=128, dtype="bfloat16")) as coarse:
        part(coarse, store, calibration, 2, 2, options)
    with pytest.raises(NotFound, match=r"No part of this text.*for another text, model, precision"):
        whole(engine, store, calibration, replace(options, merge=True))
    part(engine, store, calibration, 1, 2, options)
    with pytest.raises(PartsMissing, match=r"these are missing: 2/2.*do not add up"):
        whole(engine, store, calibration, options)
    assert len(store.parts.runs()) == 6


def test_a_second_process_on_the_machine_is_refused_and_another_part_is_not(engine, store, options):
    calibration, seen = text(6, 6), []

    def report(_) -> None:
        if not seen:
            seen.append(part(engine, store, calibration, 2, 2, options))
            with pytest.raises(Conflict, match="Another run is profiling"):
                part(engine, store, calibration, 1, 2, options)

    assert part(engine, store, calibration, 1, 2, options, report=report).missing == ()
    assert seen[0].computed


def test_two_machines_that_make_the_same_part_count_it_once(engine, store, options, tmp_path):
    calibration, seen = text(7, 7), []
    elsewhere = replace(options, runs=tmp_path / "elsewhere", rows=3)

    def report(_) -> None:
        if not seen:
            seen.append(part(engine, store, calibration, 1, 2, elsewhere))

    slower = part(engine, store, calibration, 1, 2, options, report=report)
    assert (seen[0].computed, slower.computed) == (True, False)
    part(engine, store, calibration, 2, 2, options)
    merged = whole(engine, store, calibration, options)
    with open_store(f"sqlite:///{tmp_path}/other.db") as other:
        assert_same(merged, whole(engine, other, calibration, replace(options, merge=False)))


def test_a_part_that_ends_after_the_profile_is_there_leaves_nothing(engine, store, options):
    calibration, seen = text(8, 5), []

    def report(_) -> None:
        if not seen:
            seen.append(whole(engine, store, calibration, replace(options, merge=False)))

    assert part(engine, store, calibration, 1, 2, options, report=report).missing == ()
    assert list(store.parts.runs()) == []


def test_a_damaged_part_is_missing_and_made_again(engine, store, options, tmp_path):
    calibration = text(9, 5)
    for number in (1, 2):
        part(engine, store, calibration, number, 2, options)
    run = run_of(engine, want(engine, store, "t", calibration, options).identity)
    good = store.parts.get(run, 2, 2)
    store.parts.forget(run, (2, 2))
    store.parts.put(replace(good, statistics={name: array[..., :1] for name, array in good.statistics.items()}))
    with pytest.raises(PartsMissing, match="these are missing: 2/2"):
        whole(engine, store, calibration, options)
    assert part(engine, store, calibration, 2, 2, options).computed
    assert whole(engine, store, calibration, options).tokens > 0


def test_a_part_streams_where_the_model_does_not_fit(engine, model, store, options, tmp_path):
    calibration = text(10, 9)
    part(engine, store, calibration, 1, 2, options)
    part(engine, store, calibration, 2, 2, replace(options, stream=True))
    merged = whole(engine, store, calibration, options)
    with open_store(f"sqlite:///{tmp_path}/other.db") as other:
        assert_same(merged, whole(engine, other, calibration, replace(options, merge=False)))


def test_every_part_has_items_of_all_lengths(engine):
    encoded = encode_corpus(engine, text(11, 40))
    parts = [Part(number, 4).take(encoded) for number in range(1, 5)]
    assert sorted(one.number for part in parts for one in part) == list(range(40))
    tokens = [sum(len(one.tokens) for one in part) for part in parts]
    assert max(tokens) < 1.2 * min(tokens)


@pytest.mark.parametrize("wrong", ["", "2", "0/4", "5/4", "2/0", "-1/4", "1/2/3", "two/four", "2/4 "])
def test_what_is_no_part_is_refused(wrong):
    with pytest.raises(InvalidInput, match="such as 2/4") as refused:
        Part.parse(wrong)
    assert refused.value.param == "part"


def test_more_parts_than_items_and_a_held_part_are_refused_before_any_forward(engine, store, options, passes):
    with pytest.raises(InvalidInput, match="5 items, so it can be cut into at most 5 parts"):
        part(engine, store, text(12, 5), 2, 6, options)
    with pytest.raises(InvalidInput, match="made of profiles"):
        part(engine, store, text(12, 5), 1, 2, options, task="generalist")
    assert passes == []


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import profiler.unfinished
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.corpus import read_corpus
from profiler.options import Options
from profiler.parts import Part, profile_part
from store.database import open_store

profiler.unfinished.SAVE_AFTER = 0.0
folder, model, url, die_at, seen = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), []

def report(step):
    seen.append(step)
    if len(seen) == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

with open_store(url) as store, Engine.open(EngineConfig(model, max_context=128, threads=1)) as engine:
    made = profile_part(engine, store, "t", read_corpus(folder / "c.jsonl"), Part(2, 2),
                        Options(rows=2, runs=folder / sys.argv[5]), report)
print(json.dumps({"computed": made.computed, "first": seen[0].done if seen else None}))
"""


def write(calibration: Corpus, folder: Path) -> None:
    lines = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in calibration.items]
    (folder / "c.jsonl").write_text("\n".join(lines))


@pytest.mark.slow
def test_two_processes_at_once_with_folders_of_their_own_store_one(engine, model, store, options, tmp_path):
    calibration = text(14, 9)
    write(calibration, tmp_path)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(model), f"sqlite:///{tmp_path}/store.db", "0"]
    both = [subprocess.Popen([*command, folder], stdout=subprocess.PIPE, text=True) for folder in ("one", "other")]
    told = [json.loads(process.communicate()[0]) for process in both]
    assert sorted(each["computed"] for each in told) == [False, True]
    part(engine, store, calibration, 1, 2, options)
    merged = whole(engine, store, calibration, options)
    with open_store(f"sqlite:///{tmp_path}/straight.db") as other:
        assert_same(merged, whole(engine, other, calibration, replace(options, merge=False)))


@pytest.mark.slow
def test_a_killed_part_goes_on_where_it_was(engine, model, store, options, tmp_path):
    calibration = text(13, 11)
    write(calibration, tmp_path)
    url = f"sqlite:///{tmp_path}/store.db"

    def run(die_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(model), url, str(die_at), "killed"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run(die_at=3).returncode == -9
    assert list(store.parts.runs()) == []
    resumed = run(die_at=0)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout) == {"computed": True, "first": 4}  # two shards of two items were done
    part(engine, store, calibration, 1, 2, options)
    merged = whole(engine, store, calibration, options)
    with open_store(f"sqlite:///{tmp_path}/other.db") as other:
        assert_same(merged, whole(engine, other, calibration, replace(options, merge=False)))
