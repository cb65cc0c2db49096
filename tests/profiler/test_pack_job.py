"""Packs from a task's text: every way, what the card says, and what is refused before anything is run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.options import Options
from profiler.pack_commands import app
from profiler.pack_job import pack_task
from profiler.pack_ways import Pack, coverage, make_recipe, pack_of
from profiler.progress import ignore
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


def test_the_command_writes_a_pack_and_prints_its_card(tmp_path: Path) -> None:
    folder = write_tiny("olmoe", tmp_path / "m", seed=3)
    for name, corpus in (("c", CALIBRATION), ("e", HELD_OUT)):
        lines = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in corpus.items]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = {
        "out": "out", "task": "t", "calibration": "c.jsonl", "eval": "e.jsonl", "channels": 0.5, "model": "m",
        "store": f"sqlite:///{tmp_path}/s.db", "max-context": 128, "batch": 4, "way": "wifv",
    }  # fmt: skip
    paths = {"out", "calibration", "eval", "model"}
    given = [f"--{name}={tmp_path / str(value) if name in paths else value}" for name, value in options.items()]
    done = CliRunner().invoke(app, [*given, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    card = json.loads(done.stdout.splitlines()[-1])
    assert card == json.loads((tmp_path / "out" / "pack.json").read_text())
    assert card["channel_scorer"] == "wifv.1"
    assert folder.exists()
