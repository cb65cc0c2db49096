"""The small files of a model folder: what counts in them, and that a change is noticed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from store.checkpoint import CheckpointMap
from store.errors import PapersChanged
from store.papers import Papers


@pytest.fixture
def folder(write_model: Callable[..., Path]) -> Path:
    made = write_model({"t": np.zeros((4, 5), np.float32)}, {"hidden_size": 8, "eos_token_id": 3})
    (made / "tokenizer.json").write_text('{"model": {}}')
    return made


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"hidden_size": 16, "eos_token_id": 3}'),
        ("config.json", "{"),
        ("generation_config.json", '{"eos_token_id": [3, 4]}'),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "{}"),
        ("chat_template.jinja", "{{ messages }}"),
        ("additional_chat_templates/tool_use.jinja", "{{ tools }}"),
    ],
)
def test_a_file_that_says_something_else_is_named_until_it_says_the_old_thing_again(
    folder: Path, name: str, content: str
) -> None:
    papers, file = Papers.read(folder), folder / name
    before = file.read_bytes() if file.exists() else None
    assert papers.changed() == ()
    papers.check()
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    assert papers.changed() == (name,)
    with pytest.raises(PapersChanged, match=rf"{name} in .*Open the model again"):
        papers.check()
    file.unlink() if before is None else file.write_bytes(before)
    assert papers.changed() == ()


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    papers = Papers.read(folder)
    (folder / "tokenizer.json").unlink()
    assert papers.changed() == ("tokenizer.json",)
    (folder / "config.json").unlink()
    assert papers.changed() == ("config.json",)  # nothing of the rest can be told without it


def test_layout_notes_and_other_files_are_no_change(folder: Path) -> None:
    papers = Papers.read(folder)
    noted = {"eos_token_id": 3, "hidden_size": 8, "transformers_version": "5.0", "_name_or_path": "/home/me/model"}
    (folder / "config.json").write_text(json.dumps(noted, indent=4))
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 3}')
    (folder / "README.md").write_text("x")
    assert papers.changed() == ()
    assert Papers.read(folder).meaning == papers.meaning


def test_what_ends_an_answer_counts_where_the_generation_config_says_otherwise(folder: Path) -> None:
    plain = Papers.read(folder).meaning
    seen = {plain}
    for ends in ("[3]", "[4, 3]", "5"):
        (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        seen.add(Papers.read(folder).meaning)
    assert len(seen) == 3  # [3] is what the config says
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Papers.read(folder).meaning in seen  # the order says nothing


def test_a_look_from_outside_sees_every_writing(folder: Path) -> None:
    papers = Papers.read(folder)
    states = papers.states()
    assert papers.states() == states
    os.utime(folder / "tokenizer.json", ns=(1, 1))
    assert papers.states() != states


def test_whoever_asks_whether_the_files_are_as_they_were_mapped_asks_of_these_too(folder: Path) -> None:
    checkpoint = CheckpointMap.open(folder)
    checkpoint.check()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(PapersChanged, match=r"tokenizer\.json"):
        checkpoint.check()


def test_the_fingerprint_is_of_what_was_mapped(folder: Path) -> None:
    checkpoint = CheckpointMap.open(folder)
    before = CheckpointMap.open(folder).fingerprint()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text("{}")
    assert checkpoint.fingerprint() == before
    assert checkpoint.config == {"hidden_size": 8, "eos_token_id": 3}
