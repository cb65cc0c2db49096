"""`bench profile` on a tiny model: every figure is there and in its range."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.profile_pass import bench_profile, one_layer, stream_alone
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.plan import plan_memory
from engine.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), max_position_embeddings=512)


def test_the_cap_holds_one_layer_and_not_the_model(model):
    cap = one_layer(model)
    card = ModelCard.read(model)
    plan = plan_memory(card, EngineConfig(model, memory=cap, max_context=512, max_batch=16, chunk_tokens=2048))
    assert card.experts <= plan.slots < card.layers * card.experts


def test_the_streaming_pass_is_watched(model):
    found = stream_alone(model, 1, one_layer(model))
    assert 0 < found["seconds"] < 60
    assert found["peak_anon_bytes"] >= found["idle_anon_bytes"] > 0


@pytest.mark.slow
def test_the_command_gives_the_figures_the_design_asks_for(model):
    result = CliRunner().invoke(app, ["profile", "--model", str(model), "--items", "1", "--runs", "1", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert found.keys() >= asdict(bench_profile(model, 1, 1)).keys() | {"machine"}
    assert found["ratio"] == pytest.approx(found["tok_per_s"] / found["forward_tok_per_s"], rel=0.01)
    assert found["tokens"] > 100
