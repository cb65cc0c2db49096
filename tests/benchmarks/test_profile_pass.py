"""`bench profile` on a tiny model: every figure is there and in its range."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
from typer.testing import CliRunner

from benchmarks import profile_pass
from benchmarks.commands import app
from benchmarks.memory_cap import Ended
from benchmarks.profile_pass import CHUNK, ROWS, ProfileFigures, bench_profile, longest, one_layer, stream_alone
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.plan import plan_memory
from engine.tiny import write_tiny
from store.errors import InvalidInput


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def test_the_budget_holds_one_layer_and_not_the_model(model):
    context = longest(model, 1)
    budget = one_layer(model, context)
    card = ModelCard.read(model)
    config = EngineConfig(model, memory=budget, max_context=context, max_batch=ROWS, chunk_tokens=CHUNK)
    assert card.experts <= plan_memory(card, config).slots < card.layers * card.experts


def test_the_streaming_pass_is_watched(model):
    found = stream_alone(model, 1)
    assert 0 < found["seconds"] < 60
    assert found["tokens"] > 100
    assert found["peak_anon_bytes"] >= found["idle_anon_bytes"] > 0


def test_a_cap_that_the_model_fits_is_refused(model):
    with pytest.raises(InvalidInput, match=r"--cap 1.00 GiB holds all of the model's .* would show nothing"):
        bench_profile(model, 1, 1, cap=1 << 30)


@pytest.mark.parametrize("kills", [0, 1])
def test_a_killed_pass_has_no_figures_and_says_so(model, monkeypatch, kills):
    output = json.dumps({"seconds": 2.0, "tokens": 100, "peak_anon_bytes": 7, "idle_anon_bytes": 3})
    ended = Ended(137 if kills else 0, output, "", 9, kills)
    asked = []
    monkeypatch.setattr(profile_pass, "run_capped", lambda command, cap, *_: asked.append(cap) or ended)
    found = profile_pass.streamed(model, 1, 1 << 20)
    assert asked == [1 << 20]
    assert (found.killed, found.memory_cap, found.peak_group_bytes) == (bool(kills), 1 << 20, 9)
    assert (found.tok_per_s, found.peak_anon_bytes) == ((None, None) if kills else (50.0, 7))
    assert found.within is (None if kills else True)
    assert found.parts_bytes == sum(asdict(found.parts).values())


@pytest.mark.slow
def test_the_command_gives_the_figures_the_design_asks_for(model):
    result = CliRunner().invoke(app, ["profile", "--model", str(model), "--items", "1", "--runs", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() >= {field.name for field in fields(ProfileFigures)} | {"machine"}
    assert found["ratio"] == pytest.approx(found["tok_per_s"] / found["forward_tok_per_s"], rel=0.01)
    assert found["tokens"] > 100
    assert found["streamed"]["within"] is True
