"""The demo's text: training rows drawn on the fly, and the fixed files of calibration, evaluation and test items."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.tasks.registry import TASKS
from demo.tasks.task import Task

DATA = Path(__file__).parent / "data"
SPLITS = {"calibration": 96, "evaluation": 48, "test": 100}
MAXIMUM_DRAWS = 20_000


@dataclass(frozen=True, slots=True)
class Pair:
    prompt: str
    response: str


def training_pairs(task: Task, rng: random.Random) -> Iterator[Pair]:
    while True:
        yield Pair(*task.training_item(rng))


def write_data(folder: Path = DATA, seed: int = 20260101) -> None:
    """Writes each task's three splits: calibration in training phrasings, evaluation and test in held-out ones."""
    for task in TASKS:
        rng = random.Random(f"{seed}/{task.name}")
        seen: set[str] = set()
        for split, count in SPLITS.items():
            draw = task.training_item if split == "calibration" else task.held_out_item
            pairs = distinct(draw, rng, count, seen)
            path = folder / task.name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                "".join(
                    json.dumps({"prompt": p.prompt, "response": p.response}, ensure_ascii=False) + "\n" for p in pairs
                )
            )


def distinct(
    draw: Callable[[random.Random], tuple[str, str]], rng: random.Random, count: int, seen: set[str]
) -> list[Pair]:
    """`count` pairs whose prompts occur in no earlier split; `seen` grows by them."""
    pairs: list[Pair] = []
    for _ in range(MAXIMUM_DRAWS):
        prompt, response = draw(rng)
        if prompt not in seen:
            seen.add(prompt)
            pairs.append(Pair(prompt, response))
        if len(pairs) == count:
            return pairs
    raise RuntimeError(f"Only {len(pairs)} of {count} distinct items in {MAXIMUM_DRAWS} draws.")


def read_pairs(task: str, split: str, folder: Path = DATA) -> list[Pair]:
    lines = (folder / task / f"{split}.jsonl").read_text().splitlines()
    return [Pair(**json.loads(line)) for line in lines]
