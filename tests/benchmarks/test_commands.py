"""The measurements that the docs name are commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from benchmarks.commands import app
from store.errors import InvalidInput

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("CHANGELOG.md", "Makefile")] + sorted((ROOT / "docs").glob("*.md"))


def test_every_measurement_that_a_page_names_is_a_command() -> None:
    commands = set(get_command(app).commands)
    named = {name for page in PAGES for name in re.findall(r"`(?:moepager )?bench ([a-z][a-z-]+)", page.read_text())}
    assert {"families", "load"} <= named
    assert named <= commands


COMMANDS = sorted(
    {
        " ".join(words.split())
        for page in [ROOT / "README.md", *PAGES]
        for words in re.findall(r"`moepager bench ([a-z-]+(?:\s[^`]*)?)`", page.read_text())
    }
)


@pytest.mark.parametrize("words", [words for words in COMMANDS if " " in words])
def test_a_command_that_a_page_shows_with_options_can_be_typed(words: str) -> None:
    name, *options = shlex.split(words)
    command = get_command(app).commands[name]
    context = command.make_context(name, options)  # raises a usage error for what the command does not take
    assert context.params


def test_one_family_is_tried_and_told() -> None:
    result = CliRunner().invoke(app, ["families", "--family", "mixtral", "--json"], catch_exceptions=False)
    assert [row["family"] for row in json.loads(result.stdout.splitlines()[-1])["rows"]] == ["mixtral"]


def test_a_family_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(InvalidInput, match="no MoE family 'nosuch'"):
        CliRunner().invoke(app, ["families", "--family", "nosuch"], catch_exceptions=False)


def test_mixes_of_masked_and_exact_requests_are_replayed_at_one_share_of_the_experts() -> None:
    result = CliRunner().invoke(app, ["cache", "--traffic", "--keep", "0.5", "--keep", "0.25"])
    assert result.exit_code == 2
    assert "takes one --keep, 2 were given" in result.output
