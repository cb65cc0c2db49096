"""What 8, 16 and 24 GiB hold, from published configs: the table in deploy/recipes is what the command prints."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.commands import app

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"
PUBLISHED = {  # billions of parameters, as the models' cards state them
    "DeepSeek-V2-Lite": 15.7,
    "ERNIE-4.5-21B-A3B": 21.8,
    "GLM-4.5-Air": 106.9,
    "Granite-3.1-3B-A800M": 3.3,
    "Granite-4.0-H-Small": 32,
    "LFM2-8B-A1B": 8.3,
    "Mixtral-8x7B": 46.7,
    "OLMoE-1B-7B": 6.92,
    "Phi-3.5-MoE": 41.9,
    "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-Next-80B-A3B": 80,
    "gpt-oss-20b": 20.9,
}
QUANTISED = ", MXFP4"
OPTIONS = ["--quantised", "mxfp4", "--max-context", "4096", "--max-batch", "4", "--device", "cuda"]


@pytest.fixture(scope="module")
def printed() -> str:
    """What the command in deploy/recipes/README.md prints, with its JSON on the last line."""
    configs = [str(file) for file in sorted(RECIPES.glob("*.json"))]
    result = CliRunner().invoke(app, ["recipes", *configs, *OPTIONS, "--json"])
    assert result.exit_code == 0, result.output
    return result.output


def test_every_config_has_the_published_number_of_parameters(printed: str) -> None:
    rows = json.loads(printed.splitlines()[-1])["rows"]
    found = {row["model"]: row["weight_bytes"] / 2e9 for row in rows if not row["model"].endswith(QUANTISED)}
    assert found == pytest.approx(PUBLISHED, rel=0.007)


def test_a_copy_in_four_bits_has_the_published_size_and_more_of_it_fits(printed: str) -> None:
    rows = {(row["model"], row["memory"]): row for row in json.loads(printed.splitlines()[-1])["rows"]}
    for (model, memory), row in rows.items():
        if not model.endswith(QUANTISED):
            copy = rows[model + QUANTISED, memory]
            assert 0.26 < copy["weight_bytes"] / row["weight_bytes"] < 0.4
            assert copy["floor_bytes"] < row["floor_bytes"]
            assert (copy["slots_per_layer"] or 0) >= (row["slots_per_layer"] or 0)
    [size] = {row["weight_bytes"] for (model, _), row in rows.items() if model == "gpt-oss-20b" + QUANTISED}
    assert size == pytest.approx(13.76e9, rel=0.005)  # of the shards that it is published in


def test_the_table_in_the_docs_is_what_the_command_prints(printed: str) -> None:
    table = printed[: printed.rindex('{"rows"')].strip()
    assert table in (RECIPES / "README.md").read_text()


def test_more_memory_never_holds_fewer_experts(printed: str) -> None:
    rows = json.loads(printed.splitlines()[-1])["rows"]
    for model in {row["model"] for row in rows}:
        held = [row["slots_per_layer"] or 0 for row in rows if row["model"] == model]
        assert len(held) == 3
        assert held == sorted(held)


def test_a_budget_below_the_floor_holds_nothing(printed: str) -> None:
    for row in json.loads(printed.splitlines()[-1])["rows"]:
        assert (row["slots_per_layer"] is None) == (row["memory"] < row["floor_bytes"])
