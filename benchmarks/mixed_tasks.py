"""The tasks of `bench mixed`: what each keeps of the experts, and the prompts of its requests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import uniform
from store.errors import InvalidInput
from store.records import Selection

OVERLAP = 0.5


@dataclass(frozen=True, slots=True)
class Work:
    """What every arm has to do.

    `scorer` None: random prompts and selections of any checkpoint, for speed alone. `overlap` is then the share of a
    selection that all tasks have in common (0.5 if None); the rest of it no other task has. `rows` of a batch None: as
    many as clients, so that nobody waits for one.
    """

    tasks: int = 4
    keep: float = 0.25
    clients: int = 8
    rows: int | None = None
    requests: int = 32
    prompt_tokens: int = 96
    tokens: int = 32
    scorer: str | None = None
    overlap: float | None = None
    dtype: str = "auto"
    threads: int | None = None
    seed: int = 0

    @property
    def batch_rows(self) -> int:
        return self.rows or self.clients


@dataclass(frozen=True, slots=True)
class Task:
    selection: Selection
    prompts: Sequence[tuple[int, ...]]


def tasks_of(model: Path, card: ModelCard, work: Work) -> list[Task]:
    """Raises InvalidInput for shares that are none, or that the model's experts are too few for."""
    if not 0 < work.keep <= 1:
        raise InvalidInput(f"--keep must be above 0 and at most 1, got {work.keep}.", param="keep")
    if work.scorer is None:
        return random_tasks(card, work)
    if work.overlap is not None:
        raise InvalidInput(
            "--overlap is of random selections; what a scorer keeps overlaps as it does. Leave one of both out.",
            param="overlap",
        )
    return _profiled_tasks(model, work)


def random_tasks(card: ModelCard, work: Work) -> list[Task]:
    """In every layer, first what all tasks share, then as many of its own for each of them."""
    rng = random.Random(work.seed)
    shared, own = _shares(card, work)
    orders = [rng.sample(range(card.experts), card.experts) for _ in range(card.layers)]

    def prompt() -> tuple[int, ...]:
        return tuple(rng.randrange(256) for _ in range(work.prompt_tokens))

    def selection(number: int) -> Selection:
        first = shared + number * own
        return Selection.of([order[:shared] + order[first : first + own] for order in orders])

    return [Task(selection(number), [prompt() for _ in range(work.clients)]) for number in range(work.tasks)]


def _shares(card: ModelCard, work: Work) -> tuple[int, int]:
    """Experts a layer that all tasks keep, and that each keeps alone."""
    overlap = OVERLAP if work.overlap is None else work.overlap
    if not 0 <= overlap <= 1:
        raise InvalidInput(f"--overlap must be a share from 0 to 1, got {overlap}.", param="overlap")
    count = max(card.top_k, round(work.keep * card.experts))
    shared = round(overlap * count)
    union = shared + work.tasks * (count - shared)
    if union > card.experts:
        raise InvalidInput(
            f"{work.tasks} tasks of {count} experts a layer, {shared} of them shared, need {union}; "
            f"there are {card.experts}. Raise --overlap (now {overlap}) or lower --keep.",
            param="overlap",
        )
    return shared, count - shared


def _profiled_tasks(model: Path, work: Work) -> list[Task]:
    """The demo's first tasks: what the scorer keeps after their calibration text, and the prompts of their test."""
    from benchmarks.cache import task_statistics  # noqa: PLC0415 - the demo's texts are needed here alone
    from demo.prepare import corpus  # noqa: PLC0415
    from demo.tasks.registry import TASKS  # noqa: PLC0415
    from profiler.batches import encode_corpus  # noqa: PLC0415
    from profiler.scorers.registry import SCORERS  # noqa: PLC0415

    if work.scorer not in SCORERS:
        raise InvalidInput(f"No scorer {work.scorer!r}; there are {', '.join(SCORERS)}.", param="scorer")
    scorer = SCORERS[work.scorer]
    with Engine.open(EngineConfig(model, max_context=256, max_batch=16, dtype=work.dtype)) as engine:
        return [
            Task(
                uniform(scorer.score(task_statistics(engine, task.name)), work.keep, engine.card.top_k),
                [one.prompt for one in encode_corpus(engine, corpus(task.name, "test"))],
            )
            for task in TASKS[: work.tasks]
        ]
