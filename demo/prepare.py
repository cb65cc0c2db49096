"""Profiles the bundled model's tasks into a store: the offline half of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from demo.corpus import DATA
from demo.tasks.registry import TASKS
from engine.config import EngineConfig
from engine.embedder import Embedder
from engine.engine import Engine
from profiler.corpus import Corpus, read_corpus
from profiler.generalist import profile_generalist
from profiler.job import profile_task
from profiler.options import Options
from profiler.progress import Report, ignore
from store.database import Store
from store.records import Profile, TaskRecord

MODEL_NAME = "demo"
# What does best on this model at small sizes (docs/methods.md), and the two rows that every report carries.
SCORERS = ("peu", "tcess", "easy_ep_answers", "frequency", "random")
ALLOCATORS = ("coverage",)
# On a CPU, matrices this small are five times faster in float32 than in bfloat16, whose compiled kernels would also
# take more memory than the model; and handing them to a second thread costs more than it saves.
DTYPE, THREADS = "float32", 1
EVALUATED = 24  # items a task: enough to choose by; `bench quality` measures on more, and on other items
DRAWS = 3  # of the calibration text, so that `plan` can say how sure a size is
FOREIGN = 3  # items of every other task, so that it can say what a selection does off its task


def prepare(
    store: Store,
    embedder: Embedder,
    model: Path,
    *,
    scorers: Sequence[str] | None = SCORERS,
    allocators: Sequence[str] = ALLOCATORS,
    split: str = "evaluation",
    items: int | None = EVALUATED,
    generalist: bool = True,
    runs: Path | None = None,
    report: Report = ignore,
) -> list[Profile]:
    """A profile with evidence for every demo task, and the generalist; what is stored already is not measured again."""
    options = Options(scorers=scorers, allocators=allocators, draws=DRAWS, model_name=MODEL_NAME, runs=runs)
    with Engine.open(EngineConfig(model, max_context=256, max_batch=32, dtype=DTYPE, threads=THREADS)) as engine:
        profiles = [
            profile_task(
                engine,
                store,
                TaskRecord(task.name, task.description),
                corpus(task.name, "calibration"),
                corpus(task.name, split, items),
                embedder=embedder,
                others=pooled_corpus(split, FOREIGN, without=task.name),
                options=options,
                report=report,
            )
            for task in TASKS
        ]
        if generalist:
            pooled = pooled_corpus(split, max(1, (items or EVALUATED) // 4))
            whole = replace(options, draws=0)  # made of profiles, not of text
            profiles.append(profile_generalist(engine, store, pooled, options=whole, report=report))
    return profiles


def corpus(task: str, split: str, items: int | None = None) -> Corpus:
    whole = read_corpus(DATA / task / f"{split}.jsonl")
    return whole if items is None else replace(whole, items=whole.items[:items])


def pooled_corpus(split: str, each: int, without: str | None = None) -> Corpus:
    """The first `each` items of every task, but for one: for judging the generalist, and selections off their task."""
    parts = [corpus(task.name, split, each) for task in TASKS if task.name != without]
    return replace(parts[0], items=tuple(item for part in parts for item in part.items))
