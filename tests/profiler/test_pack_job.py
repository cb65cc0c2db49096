"""Packs from a task's text: every way, what the card says, and what is refused before anything is run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.channels.registry import CHANNEL_SCORERS
from profiler.corpus import Item, gather
from profiler.job import profile_task
from profiler.options import Options
from profiler.pack_commands import app
from profiler.pack_job import pack_task
from profiler.pack_ways import Pack, coverage, make_recipe, pack_of
from profiler.progress import ignore
from profiler.statistics import Statistics
from store.database import open_store
from store.errors import Conflict, InvalidInput
from store.records import TaskRecord

CALIBRATION = gather([Item(f"number {n} " + "and more " * (n % 3), "yes" * (1 + n % 2)) for n in range(6)])
HELD_OUT = gather([Item(f"what of {n}?", "no") for n in range(3)])


def _config(folder: Path) -> EngineConfig:
    return EngineConfig(folder, max_context=128, max_batch=4)


@pytest.mark.parametrize("way", ["camera", "heapr", "coverage", "experts", "dern", "sub_moe"])
def test_every_way_halves_the_experts_bytes_and_says_what_is_left(way: str, tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    options = Options(rows=4, runs=tmp_path / "runs")
    with open_store(f"sqlite:///{tmp_path}/s.db") as store:
        pack = pack_of(way, 0.5)
        texts = CALIBRATION, HELD_OUT
        card = pack_task(_config(folder), store, TaskRecord("t"), texts, pack, tmp_path / "out", options, ignore)
        assert card["profile"] == store.profiles.list(task="t")[0].id
        assert store.selections.find(card["profile"]) == []
    assert card["expert_bytes"][1] * 2 == card["expert_bytes"][0]
    assert card["way"] == way
    assert card["evaluation"]["pack"]["items"] == 3
    with Engine.open(_config(folder)) as whole, Engine.open(_config(tmp_path / "out")) as packed:
        assert card["packed_from"] == whole.card.fingerprint != packed.card.fingerprint
        experts, channels = packed.card.experts, packed.layers.channels.width
    assert (experts, channels) == ((8, 8) if pack.channels < 1 else (4, 16))


def test_experts_and_channels_go_together_and_the_best_of_both_stay(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    pack = Pack("camera", channels=0.5, experts=0.5, scorer="frequency")
    with open_store(f"sqlite:///{tmp_path}/s.db") as store:
        texts, options = (CALIBRATION, None), Options(rows=4, runs=tmp_path / "runs")
        card = pack_task(_config(folder), store, TaskRecord("t"), texts, pack, tmp_path / "out", options, ignore)
        with Engine.open(_config(folder)) as engine:
            from profiler.statistics import Statistics

            statistics = Statistics.from_arrays(store.profiles.get(card["profile"]).statistics)
            recipe = make_recipe(engine, statistics, pack, encode_corpus(engine, CALIBRATION), 4)
    assert (recipe.kept, recipe.width) == (4, 8)
    assert card["evaluation"] is None
    assert card["covered"]["free"] >= card["covered"]["uniform"]
    busiest = np.argsort(-statistics.total("selected")[0], kind="stable")[:4]
    assert sorted(busiest.tolist()) == list(recipe.selection.experts[0])


def test_a_pack_in_strips_is_all_of_the_model_and_is_profiled_strip_by_strip(tmp_path: Path) -> None:
    """From the text to the evidence of half of the bytes, as for any model: a strip is what a selection keeps."""
    folder = write_tiny("qwen2_moe", tmp_path / "m", seed=3)
    options = Options(rows=4, runs=tmp_path / "runs", scorers=["camera"], keeps=[0.5])
    with open_store(f"sqlite:///{tmp_path}/s.db") as store:
        texts, task = (CALIBRATION, HELD_OUT), TaskRecord("t")
        pack = Pack("camera", strips=2)
        card = pack_task(_config(folder), store, task, texts, pack, tmp_path / "out", options, ignore)
        assert (card["strips"], card["channel_scorer"]) == (2, "camera.1")
        assert card["expert_bytes"][0] == card["expert_bytes"][1]
        assert card["evaluation"]["pack"]["nll"] == pytest.approx(card["evaluation"]["whole"]["nll"], rel=1e-4)
        with Engine.open(_config(tmp_path / "out")) as engine:
            made = profile_task(engine, store, task, *texts, embedder=HashEmbedder(), options=options)
            breeding = replace(options, evolve=4)
            with pytest.raises(InvalidInput, match="leave --evolve out"):
                profile_task(engine, store, task, *texts, embedder=HashEmbedder(), options=breeding)
        [(stored, measured)] = store.evaluations.list(made.id)
    assert [len(ids) for ids in stored.selection.experts] == [8] * 3
    assert measured.items == 3
    assert 0 < measured.coverage < 1
    statistics = Statistics.from_arrays(made.statistics)
    assert np.array_equal(*(statistics.total("selected")[:, at::2] for at in (0, 1)))  # an expert's strips go together
    worth = CHANNEL_SCORERS["camera"].score(statistics).sum(axis=2)  # [L, E*P]
    assert (worth[:, 0::2] >= worth[:, 1::2]).all()  # the pack was made on the same text: the better half is first
    kept = {strip for strip in stored.selection.experts[0] if strip % 2 == 0}
    assert len(kept) > 4, "first strips are preferred"


def test_free_widths_cover_more_than_one_width_for_all() -> None:
    scores = np.array([[[9.0, 1, 0, 0], [1, 1, 1, 1]], [[1, 1, 1, 1], [5, 5, 5, 5]]])
    found = coverage(scores, 2)
    assert found["uniform"] == pytest.approx(min((10 + 2) / 14, (2 + 10) / 24))
    assert found["free"] > found["uniform"]


def test_what_makes_no_sense_is_refused_before_anything_is_run(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no way to pack"):
        Pack("snip")
    with pytest.raises(InvalidInput, match="all channels"):
        Pack("dern", channels=0.5)
    with pytest.raises(InvalidInput, match="share of experts"):
        Pack("camera", experts=0)
    with open_store(f"sqlite:///{tmp_path}/s.db") as store, pytest.raises(Conflict, match="exists"):
        pack_task(
            _config(tmp_path / "absent"), store, TaskRecord("t"), (CALIBRATION, None), Pack("camera"), tmp_path,
            Options(), ignore,
        )  # fmt: skip


@pytest.mark.parametrize(("shape", "experts"), [({"channels": 0.5}, 8), ({"strips": 2}, 16)])
def test_the_command_writes_a_pack_and_prints_its_card(shape: dict[str, float], experts: int, tmp_path: Path) -> None:
    folder = write_tiny("olmoe", tmp_path / "m", seed=3)
    for name, corpus in (("c", CALIBRATION), ("e", HELD_OUT)):
        lines = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in corpus.items]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = {
        "out": "out", "task": "t", "calibration": "c.jsonl", "eval": "e.jsonl", "model": "m", **shape,
        "store": f"sqlite:///{tmp_path}/s.db", "max-context": 128, "batch": 4, "way": "wifv",
    }  # fmt: skip
    paths = {"out", "calibration", "eval", "model"}
    given = [f"--{name}={tmp_path / str(value) if name in paths else value}" for name, value in options.items()]
    done = CliRunner().invoke(app, ["pack", *given, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout.splitlines()[-1])
    assert card == json.loads((tmp_path / "out" / "pack.json").read_text())
    assert (card["channel_scorer"], card["experts"]) == ("wifv.1", [8, experts])
    assert folder.exists()
