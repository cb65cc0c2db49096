"""The verdict on profiles as a cache: recorded routing of the trained demo model through every policy at equal bytes.

Routing is recorded with every expert reachable, so it is what exact mode would need. Workloads differ in how often the
task changes from one request to the next: never, one time in ten, every second time, always at random.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.cache_policies import ONLINE, Request, fixed, masked, profile
from benchmarks.cache_traffic import TrafficRow, bench_traffic
from benchmarks.routing_trace import record
from demo.prepare import corpus
from demo.tasks.registry import TASKS
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import uniform
from profiler.batches import encode_corpus
from profiler.gather import gather_statistics
from profiler.progress import ignore
from profiler.run import Run
from profiler.scorers.registry import SCORERS
from profiler.statistics import Statistics
from store.records import ExpertKey, Selection

SWITCHING: Mapping[str, float] = {"one task": 0.0, "rare switches": 0.1, "frequent switches": 0.5, "random tasks": 1.0}
ROWS = 16


@dataclass(frozen=True, slots=True)
class Arm:
    workload: str
    name: str
    keep: float
    slots: int
    hit_rate: float
    bytes_read: int
    experts_read_per_request: float


def bench_cache(model: Path, keeps: Sequence[float], requests: int, scorer: str, seed: int = 0) -> list[Arm]:
    card, recorded, statistics = _seen(model)
    arms = []
    for keep in keeps:
        sets = _selections(statistics, scorer, keep, card.top_k)
        slots = len(next(iter(sets.values())))
        everyone = _global(statistics, slots)
        chance = frozenset(random.Random(seed).sample(list(Selection.whole(card.layers, card.experts)), slots))
        for workload, switch in SWITCHING.items():
            trace = workload_of(recorded, requests, switch, seed)
            tallies = {name: policy(trace, slots) for name, policy in ONLINE.items()}
            tallies |= {"global": fixed(trace, everyone), "random": fixed(trace, chance)}
            tallies |= {"profile": profile(trace, sets), "profile-masked": masked(trace, sets)}
            for name, tally in tallies.items():
                size = tally.reads * card.expert_bytes
                arms.append(Arm(workload, name, keep, slots, tally.hit_rate, size, tally.reads / requests))
    return arms


def bench_mixes(model: Path, keep: float, requests: int, scorer: str) -> list[TrafficRow]:
    """Masked and exact requests side by side: the engine's own eviction beside a plain LRU with as many slots."""
    card, recorded, statistics = _seen(model)
    sets = _selections(statistics, scorer, keep, card.top_k)
    return bench_traffic(recorded, sets, card.layers, card.experts, card.expert_bytes, requests)


def _seen(model: Path) -> tuple[ModelCard, dict[str, list[Request]], dict[str, Statistics]]:
    """What each task's test items were routed to, and the statistics of its calibration text."""
    with Engine.open(EngineConfig(model, max_context=256, max_batch=ROWS)) as engine:
        recorded = {task.name: record(engine, task.name, corpus(task.name, "test")) for task in TASKS}
        return engine.card, recorded, {task.name: task_statistics(engine, task.name) for task in TASKS}


def _selections(
    statistics: Mapping[str, Statistics], scorer: str, keep: float, top_k: int
) -> dict[str, frozenset[ExpertKey]]:
    scores = {task: SCORERS[scorer].score(each) for task, each in statistics.items()}  # [L, E] each
    return {task: frozenset(uniform(score, keep, top_k)) for task, score in scores.items()}


def workload_of(recorded: Mapping[str, Sequence[Request]], requests: int, switch: float, seed: int) -> list[Request]:
    """A Markov chain over tasks: with probability `switch` the next request's task is drawn anew."""
    rng = random.Random(seed)
    tasks = sorted(recorded)
    task = rng.choice(tasks)
    trace = []
    for _ in range(requests):
        if rng.random() < switch:
            task = rng.choice(tasks)
        trace.append(rng.choice(recorded[task]))
    return trace


def verdicts(arms: Sequence[Arm]) -> list[str]:
    """What the figures say about profiles, where they lose too."""
    lines = []
    for workload, keep in dict.fromkeys((arm.workload, arm.keep) for arm in arms):
        here = {arm.name: arm for arm in arms if (arm.workload, arm.keep) == (workload, keep)}
        ratio = here["profile"].bytes_read / here["lru"].bytes_read
        word = "fewer" if ratio < 1 else "more"
        lines.append(
            f"{workload}, keep {keep:g}: as an exact cache the profile reads {max(ratio, 1 / ratio):.2f}x {word} bytes "
            "than LRU; "
            f"masked it reads {here['profile-masked'].bytes_read / here['lru'].bytes_read:.2f} of LRU's bytes "
            f"and re-routes {1 - here['profile-masked'].hit_rate:.1%} of uses."
        )
    return lines


def task_statistics(engine: Engine, task: str) -> Statistics:
    text = encode_corpus(engine, corpus(task, "calibration"))
    with tempfile.TemporaryDirectory() as folder:
        return gather_statistics(engine, text, Run(Path(folder), task, plan="trace"), task, ROWS, ignore)


def _global(statistics: Mapping[str, Statistics], slots: int) -> frozenset[ExpertKey]:
    """The experts that all tasks together use most."""
    total = sum(SCORERS["frequency"].score(each) for each in statistics.values())  # [L, E]
    ranked = np.argsort(-np.asarray(total), axis=None, kind="stable")[:slots]
    return frozenset(ExpertKey(*divmod(int(place), np.shape(total)[1])) for place in ranked)
