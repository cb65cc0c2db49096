"""The text that retrieval is measured on: for each set, tasks with exemplars and other queries of the same tasks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.public_text import Tasks, function_calls, human_eval, mmlu_subjects
from demo.corpus import read_pairs
from demo.tasks.registry import TASKS

EXEMPLARS = 32
QUERIES = 100


@dataclass(frozen=True, slots=True)
class Labelled:
    """Texts with the number of the task each belongs to."""

    texts: tuple[str, ...]
    tasks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RetrievalSet:
    name: str
    exemplars: Labelled
    queries: Labelled


def demo_set() -> RetrievalSet:
    """Exemplars in training phrasings, queries in held-out ones."""
    exemplars = {
        task.name: [pair.prompt for pair in read_pairs(task.name, "calibration")][:EXEMPLARS] for task in TASKS
    }
    queries = {task.name: [pair.prompt for pair in read_pairs(task.name, "test")] for task in TASKS}
    return RetrievalSet("demo", _label(exemplars), _label(queries))


def sources_set(seed: int = 0) -> RetrievalSet:
    """Tasks as an operator would draw them: code, exam questions, function calls, agents' chores, web research."""
    calls = function_calls()
    tasks = {
        "code": human_eval(),
        "exams": [question for questions in mmlu_subjects().values() for question in questions],
        "function calls": calls["python functions"],
        "chores": calls["file and trading agents"],
        "web research": calls["web search"],
    }
    return _split("sources", tasks, seed)


def kinds_set(seed: int = 0) -> RetrievalSet:
    """HumanEval and the kinds of function-calling requests, as tasks. Some differ in little but the language."""
    return _split("kinds", {"humaneval": human_eval(), **function_calls()}, seed)


def mmlu_set() -> RetrievalSet:
    """57 subjects of at most five questions: the last of each is the query, the others are exemplars."""
    subjects = mmlu_subjects()
    exemplars = {name: texts[:-1] for name, texts in subjects.items()}
    return RetrievalSet("mmlu", _label(exemplars), _label({name: texts[-1:] for name, texts in subjects.items()}))


def _split(name: str, tasks: Tasks, seed: int) -> RetrievalSet:
    rng = random.Random(seed)
    exemplars, queries = {}, {}
    for task, texts in tasks.items():
        distinct = sorted(set(texts))
        rng.shuffle(distinct)
        size = min(EXEMPLARS, len(distinct) // 2)
        exemplars[task], queries[task] = distinct[:size], distinct[size : size + QUERIES]
    return RetrievalSet(name, _label(exemplars), _label(queries))


def _label(tasks: Tasks) -> Labelled:
    pairs: Sequence[tuple[str, int]] = [(text, number) for number, texts in enumerate(tasks.values()) for text in texts]
    return Labelled(tuple(text for text, _ in pairs), tuple(number for _, number in pairs))
