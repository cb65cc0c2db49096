"""The demo's tasks: what is held out is really held out, and the data files are what the code writes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from demo.corpus import DATA, SPLITS, read_pairs, write_data
from demo.tasks.registry import TASKS, task_named
from demo.tasks.task import Task, is_held_out

NAMES = [task.name for task in TASKS]


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_no_held_out_phrasing_is_a_training_phrasing(task: Task) -> None:
    for kind in task.kinds:
        assert not set(kind.phrasings) & set(kind.held_out)
        assert len(set(kind.phrasings)) >= 5
        assert len(set(kind.held_out)) >= 3


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_training_never_draws_a_held_out_query(task: Task) -> None:
    rng = random.Random(3)
    drawn = {task.training_item(rng)[0] for _ in range(3000)}
    held_out = {pair.prompt for split in ("evaluation", "test") for pair in read_pairs(task.name, split)}
    assert not drawn & held_out


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_the_same_question_always_has_the_same_answer(task: Task) -> None:
    rng = random.Random(4)
    answers: dict[str, str] = {}
    for prompt, answer in (task.training_item(rng) for _ in range(3000)):
        assert answers.setdefault(prompt, answer) == answer


@pytest.mark.parametrize("task", TASKS, ids=NAMES)
def test_the_splits_of_a_task_share_no_prompt(task: Task) -> None:
    prompts = [pair.prompt for split in SPLITS for pair in read_pairs(task.name, split)]
    assert len(prompts) == sum(SPLITS.values())
    assert len(set(prompts)) == len(prompts)


def test_the_stored_data_is_what_the_code_writes(tmp_path: Path) -> None:
    write_data(tmp_path)
    for path in sorted(DATA.rglob("*.jsonl")):
        assert (tmp_path / path.relative_to(DATA)).read_bytes() == path.read_bytes(), path.name


def test_about_one_content_in_eight_is_held_out() -> None:
    share = sum(is_held_out({"a": a, "b": b}) for a in range(60) for b in range(60)) / 3600
    assert 0.1 < share < 0.15


def test_sums_and_differences_are_right() -> None:
    rng = random.Random(5)
    plus, minus = task_named("arithmetic").kinds
    for _ in range(200):
        slots, text = plus.sample(rng)
        assert int(text) == int(str(slots["a"])) + int(str(slots["b"]))
        slots, text = minus.sample(rng)
        assert int(text) == int(str(slots["a"])) - int(str(slots["b"])) >= 0


def test_french_adjectives_agree_with_their_nouns() -> None:
    kind = task_named("french").kinds[0]
    rng = random.Random(6)
    phrases = {str(slots["x"]): answer for slots, answer in (kind.sample(rng) for _ in range(4000))}
    assert phrases["the green house"] == "la maison verte"
    assert phrases["a black cat"] == "un chat noir"
    assert phrases["my white car"] == "ma voiture blanche"
