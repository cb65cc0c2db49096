"""Mode auto's guard on the demo's held-out test items: what it tells apart, what it saves, what it costs.

Every task's best selection at every size answers test items of its own task and, as if retrieval had been wrong, items
of the others. The guard's bound was drawn from the evaluation items, which are no test items. Three arms answer the
same items one after the other in one engine, whose budget holds one selection of that size: mask, auto, exact.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from demo.commands import memory_for
from demo.prepare import DTYPE, THREADS, corpus, prepare
from demo.tasks.registry import TASKS
from demo.tour import MAX_BATCH, MAX_CONTEXT
from engine.config import EngineConfig
from engine.embedder import open_embedder
from engine.engine import Engine
from engine.guard import WATCH, Guard, draw_guard
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from profiler.batches import Encoded, encode_corpus
from profiler.evaluate import SPARE_TOKENS
from profiler.progress import Progress, Report
from service.retrieval import auroc
from service.serving import Candidate, ProfiledTask, best_by_size, read_candidates
from store.database import Store, open_store
from store.errors import InvalidInput
from store.home import bundled_model
from store.records import Profile

if TYPE_CHECKING:
    from collections.abc import Iterator

ARMS = ("mask", "auto", "exact")
SPLIT_ITEMS = 48  # evaluation items a task, all there are: the bound rests on them


@dataclass(frozen=True, slots=True)
class ArmOf:
    """One arm on items of one kind: share right, share escalated, and means of a query."""

    accuracy: float
    escalated: float
    bytes_paged: float
    seconds: float


@dataclass(frozen=True, slots=True)
class GuardRow:
    """A task's selection at a size. `auroc` of the guard's level, own items against others'; an alarm is false on the
    task's own items, a detection on others'. `bound` was drawn for a false-alarm rate of `wanted_rate`."""

    task: str
    keep: float
    auroc: float
    bound: float
    wanted_rate: float
    false_alarms: float
    detections: float
    own: dict[str, ArmOf]
    others: dict[str, ArmOf]
    items: int


@dataclass(frozen=True, slots=True)
class GuardMean:
    """Over the tasks at a size; `worst_` is the worst task's. Times are over mask mode's on the same items."""

    keep: float
    auroc: float
    worst_auroc: float
    false_alarms: float
    worst_false_alarms: float
    detections: float
    worst_detections: float
    own_accuracy: dict[str, float]
    others_accuracy: dict[str, float]
    own_time: dict[str, float]
    others_time: dict[str, float]
    own_bytes: dict[str, float]
    others_bytes: dict[str, float]


def bench_guard(keeps: Sequence[float], items: int, alarm_rate: float, report: Report) -> list[GuardRow]:
    with _profiled(report) as (store, profiles):
        rows: list[GuardRow] = []
        for keep in keeps:
            config = EngineConfig(
                bundled_model(), memory=memory_for(bundled_model(), keep), max_context=MAX_CONTEXT,
                max_batch=MAX_BATCH, dtype=DTYPE, threads=THREADS,
            )  # fmt: skip
            with Engine.open(config) as engine:
                texts = {task.name: encode_corpus(engine, corpus(task.name, "test", items)) for task in TASKS}
                for profile in profiles:
                    report(Progress(profile.task, "evaluate", len(rows), len(keeps) * len(profiles)))
                    rows.append(_row(engine, profile.task, _best(store, profile, keep), texts, alarm_rate))
        report(Progress(profiles[-1].task, "evaluate", len(rows), len(rows)))
        return rows


@contextmanager
def _profiled(report: Report) -> Iterator[tuple[Store, list[Profile]]]:
    with (
        tempfile.TemporaryDirectory(prefix="moepager-guard-") as folder,
        open_store(f"sqlite:///{folder}/store.db") as store,
    ):
        hashed = open_embedder("hash")  # retrieval takes no part in this
        runs = Path(folder) / "runs"
        yield (
            store,
            prepare(store, hashed, bundled_model(), items=SPLIT_ITEMS, generalist=False, runs=runs, report=report),
        )


def _best(store: Store, profile: Profile, keep: float) -> Candidate:
    """What the service would serve at this size."""
    task = ProfiledTask(profile.task, "", profile.id, read_candidates(store, profile))
    found = [one for one in best_by_size(task, None) if one.stored.keep == keep]
    if not found:
        raise InvalidInput(f"The demo's profiles have no selection that keeps {keep:g}.", param="keep")
    return found[0]


def _row(
    engine: Engine, task: str, candidate: Candidate, texts: dict[str, list[Encoded]], alarm_rate: float
) -> GuardRow:
    guard = draw_guard(candidate.evidence.levels, alarm_rate)
    if guard is None:
        raise InvalidInput(f"{len(candidate.evidence.levels)} items draw no bound at {alarm_rate:g}.", param="rate")
    own = texts[task]
    strangers = [one for name, text in texts.items() if name != task for one in text]
    others = random.Random(task).sample(strangers, min(len(own), len(strangers)))
    (own_arms, own_levels), (others_arms, others_levels) = (
        _arms(engine, candidate, guard, items) for items in (own, others)
    )
    return GuardRow(
        task=task,
        keep=candidate.stored.keep,
        auroc=auroc(np.array(own_levels), np.array(others_levels)) or 0.0,
        bound=guard.bound,
        wanted_rate=guard.alarm_rate,
        false_alarms=own_arms["auto"].escalated,
        detections=others_arms["auto"].escalated,
        own=own_arms,
        others=others_arms,
        items=len(own),
    )


def _arms(
    engine: Engine, candidate: Candidate, guard: Guard, items: Sequence[Encoded]
) -> tuple[dict[str, ArmOf], list[float]]:
    """Every arm's figures, and the levels that the guard would have seen had it never stopped anything."""
    plain = GenerationRequest((0,), candidate.stored.selection, "auto", guard=WATCH)
    kinds = {
        "mask": plain,
        "auto": replace(plain, guard=guard, restarts=True),
        "exact": replace(plain, selection=None, mode="exact", guard=None),
    }
    arms, levels = {}, list[float]()
    order = random.Random(candidate.stored.id).sample(ARMS, len(ARMS))  # none is always first
    _answers(engine, kinds["exact"], items[:1])  # what is slow once is not timed
    for name in order:
        kind = kinds[name]
        engine.evict()
        started = time.perf_counter()
        ends = _answers(engine, kind, items)
        seconds = (time.perf_counter() - started) / len(items)
        right = [end.text.strip() == (one.item.response or "").strip() for end, one in zip(ends, items, strict=True)]
        stopped = [end.served.escalated is not None for end in ends]
        arms[name] = ArmOf(fmean(right), fmean(stopped), fmean(end.served.bytes_paged for end in ends), seconds)
        if name == "mask":
            levels = [end.served.level or 0.0 for end in ends]
    return arms, levels


def _answers(engine: Engine, kind: GenerationRequest, items: Sequence[Encoded]) -> list[FinishedEvent]:
    room = engine.plan.max_context
    requests = [
        replace(
            kind,
            prompt=one.prompt,
            sampling=Sampling(max_tokens=min(len(one.response) + SPARE_TOKENS, room - len(one.prompt))),
        )
        for one in items
    ]
    ends = [event for event in engine.generate(requests) if isinstance(event, FinishedEvent)]
    return sorted(ends, key=lambda end: end.row)


def guard_means(rows: Sequence[GuardRow]) -> list[GuardMean]:
    """The largest size first."""
    made = []
    for keep in sorted({row.keep for row in rows}, reverse=True):
        group = [row for row in rows if row.keep == keep]
        own, others = [row.own for row in group], [row.others for row in group]
        made.append(
            GuardMean(
                keep=keep,
                auroc=fmean(row.auroc for row in group),
                worst_auroc=min(row.auroc for row in group),
                false_alarms=fmean(row.false_alarms for row in group),
                worst_false_alarms=max(row.false_alarms for row in group),
                detections=fmean(row.detections for row in group),
                worst_detections=min(row.detections for row in group),
                own_accuracy={arm: fmean(kind[arm].accuracy for kind in own) for arm in ARMS},
                others_accuracy={arm: fmean(kind[arm].accuracy for kind in others) for arm in ARMS},
                own_time=_times(own),
                others_time=_times(others),
                own_bytes={arm: fmean(kind[arm].bytes_paged for kind in own) for arm in ARMS},
                others_bytes={arm: fmean(kind[arm].bytes_paged for kind in others) for arm in ARMS},
            )
        )
    return made


def _times(kinds: Sequence[dict[str, ArmOf]]) -> dict[str, float]:
    mask = sum(kind["mask"].seconds for kind in kinds)
    return {arm: sum(kind[arm].seconds for kind in kinds) / mask for arm in ARMS}
