"""`bench ttft` on a tiny model: every arm does what its name says, at every prompt length."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from engine.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), num_experts=16)


def test_the_command_reports_each_length_and_reads_the_selection_every_time(model):
    given = ["ttft", "--model", str(model), "--prompts", "4,24", "--runs", "2", "--json"]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert [row["prompt_tokens"] for row in rows] == [4, 24]
    for row in rows:
        assert row["bytes"] == rows[0]["bytes"] > 0
        assert min(row[name] for name in ("read_s", "prefill_s", "cold_s", "predicted_over_read")) > 0
        assert 0 <= row["waited_s"] <= row["cold_s"]
        assert row["over_sum"] < row["over_max"]
        assert row["runs"] == 2


@pytest.mark.parametrize("prompts", ["", "0", "8,x"])
def test_lengths_that_are_none_are_refused(model, prompts):
    result = CliRunner().invoke(app, ["ttft", "--model", str(model), "--prompts", prompts])
    assert result.exit_code
    assert "--prompts wants" in str(result.exception)
