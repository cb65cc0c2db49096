"""Every architecture of transformers' registry against docs/families.md: what it says is what was found just now."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.families import ALL, MARK, Row, examine, table, write_table
from engine.tiny_config import moe_families

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
FIX = "Run `moepager bench families --out docs/families.md` and read what changed."


@pytest.mark.parametrize("family", sorted(moe_families()))
def test_a_family_is_as_the_page_says(family: str) -> None:
    found = examine(family)
    assert found.line in PAGE.read_text().splitlines(), FIX
    assert found.refused or found.holds == ALL


def test_the_page_has_a_line_for_every_family_and_no_other() -> None:
    made = PAGE.read_text().split(MARK)[1]
    lines = [line.split("`")[1] for line in made.splitlines() if line.startswith("| `")]
    assert sorted(lines) == sorted(moe_families()), FIX


def test_twenty_architectures_and_more_keep_every_rule() -> None:
    kept = {line.split("|")[2] for line in PAGE.read_text().splitlines() if line.endswith(f"| {ALL} |")}
    assert len(kept) >= 20


def test_families_are_found_by_what_their_configs_say() -> None:
    assert {"olmoe": "OlmoeForCausalLM", "afmoe": "AfmoeForCausalLM"}.items() <= moe_families().items()
    assert not {"llama", "gpt2", "qwen3"} & moe_families().keys()


def test_the_table_is_written_below_the_mark_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# By hand\n\n{MARK}\nold\n")
    write_table([Row("b", "B", "r", "l", ALL), Row("a", "A", refused="because")], page)
    assert page.read_text() == "# By hand\n\n" + table([Row("b", "B", "r", "l", ALL), Row("a", "A", refused="because")])
    assert "## Served (1)" in page.read_text()
    assert "| `a` | A | because |" in page.read_text()
