"""Several tasks at once: one batch that mixes them, beside traffic of one task and beside a swap for every request.

Every arm answers the same number of requests with equally many tokens, from as many clients, each of which sends its
next request when it has its answer. Arms take turns; experts are resident before an arm is timed, except where swapping
them is what the arm is about.

mixed      requests of all tasks in one batch, over a bank that holds the union of their selections
single     requests of one task (another one every run) in the same bank
swap       a bank of one selection; one request after the other, in the order of arrival
scheduled  the same bank and requests, in the order that the scheduler chooses
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from benchmarks.mixed_tasks import Task, Work, tasks_of
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from engine.worker import EngineWorker

ARMS = ("mixed", "single", "swap", "scheduled")


@dataclass(frozen=True, slots=True)
class Arm:
    """`tok_per_s` is the median over the runs; latencies are those of all requests, from asking to the last token; what
    was paged is a run's, in the mean; `union` is how many experts the tasks have together."""

    name: str
    tok_per_s: float
    p50_s: float
    p99_s: float
    ttft_p50_s: float
    experts_paged: int
    bytes_paged: int
    union: int
    runs: int


@dataclass(slots=True)
class _Samples:
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    experts: int = 0
    bytes: int = 0


def bench_mixed(model: Path, work: Work, runs: int) -> tuple[list[Arm], dict[str, float]]:
    """The arms, and ratios of their rates: medians of the ratios run by run."""
    card = ModelCard.read(model)
    tasks = tasks_of(model, card, work)
    union = len({key for task in tasks for key in task.selection})
    largest = max(len(task.selection) for task in tasks)
    samples = {name: _Samples() for name in ARMS}
    with _engine(model, work, union) as wide, _engine(model, work, largest) as narrow:
        for run in range(-1, runs):  # one to warm up
            for name, requests, engine, serve in _turns(tasks, work, run, wide, narrow):
                if engine is wide:
                    _fill(engine, tasks)
                _measure(samples[name] if run >= 0 else _Samples(), requests, engine, serve)
    return [_arm(name, samples[name], union, runs) for name in ARMS], _ratios(samples)


Serve = Callable[[Engine, Sequence[GenerationRequest]], Iterator[tuple[float, FinishedEvent]]]


def _turns(
    tasks: Sequence[Task], work: Work, run: int, wide: Engine, narrow: Engine
) -> Iterator[tuple[str, Sequence[GenerationRequest], Engine, Serve]]:
    clients = _clients(work.clients)
    yield "mixed", _requests(tasks, work, run), wide, clients
    yield "single", _requests([tasks[run % len(tasks)]], work, run), wide, clients
    yield "swap", _requests(tasks, work, run), narrow, _one_by_one
    yield "scheduled", _requests(tasks, work, run), narrow, clients


def _requests(tasks: Sequence[Task], work: Work, run: int) -> list[GenerationRequest]:
    """As many of each task, shuffled: the next request is seldom of the same task."""
    rng = random.Random(work.seed + run)
    sampling = Sampling(max_tokens=work.tokens, ignore_eos=True)
    requests = [
        GenerationRequest(rng.choice(task.prompts), task.selection, "mask", sampling)
        for number in range(work.requests)
        for task in [tasks[number % len(tasks)]]
    ]
    rng.shuffle(requests)
    return requests


def _measure(samples: _Samples, requests: Sequence[GenerationRequest], engine: Engine, serve: Serve) -> None:
    before, started = engine.residency(), time.perf_counter()
    answers = list(serve(engine, requests))
    samples.rates.append(sum(done.completion_tokens for _, done in answers) / (time.perf_counter() - started))
    samples.seconds += [seconds for seconds, _ in answers]
    samples.ttft += [done.served.ttft_ms / 1000 for _, done in answers]
    now = engine.residency()
    samples.experts += now.experts_paged - before.experts_paged
    samples.bytes += now.bytes_paged - before.bytes_paged


def _one_by_one(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[tuple[float, FinishedEvent]]:
    for request in requests:
        started = time.perf_counter()
        [done] = [event for event in engine.generate([request]) if isinstance(event, FinishedEvent)]
        yield time.perf_counter() - started, done


def _clients(count: int) -> Serve:
    """`count` threads, each of which asks, waits for the answer and takes the next request."""

    def serve(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[tuple[float, FinishedEvent]]:
        answers: list[tuple[float, FinishedEvent]] = []
        left, lock = iter(requests), threading.Lock()

        def client(worker: EngineWorker) -> None:
            while True:
                with lock:
                    request = next(left, None)
                if request is None:
                    return
                started = time.perf_counter()
                [done] = [event for event in worker.submit(request) if isinstance(event, FinishedEvent)]
                answers.append((time.perf_counter() - started, done))

        with EngineWorker(engine) as worker:
            threads = [threading.Thread(target=client, args=(worker,)) for _ in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if len(answers) < len(requests):
            raise AssertionError(f"{len(requests) - len(answers)} of {len(requests)} requests got no answer")
        return iter(answers)

    return serve


def _fill(engine: Engine, tasks: Sequence[Task]) -> None:
    for task in tasks:
        with engine.lease(task.selection):
            pass


@contextmanager
def _engine(model: Path, work: Work, slots: int) -> Iterator[Engine]:
    """An engine whose budget holds that many experts."""
    fields = {"max_batch": work.clients, "chunk_tokens": 512, "dtype": work.dtype, "threads": work.threads}
    context = min(ModelCard.read(model).max_context, max(256, work.prompt_tokens + work.tokens))
    plan = plan_memory(ModelCard.read(model), EngineConfig(model, memory=None, max_context=context, **fields))  # type: ignore[arg-type]
    memory = plan.fixed_bytes + slots * plan.slot_bytes
    config = EngineConfig(model, memory=memory, max_context=context, **fields)  # type: ignore[arg-type]
    with Engine.open(config) as engine:
        yield engine


def _arm(name: str, samples: _Samples, union: int, runs: int) -> Arm:
    cuts = quantiles(samples.seconds, n=100, method="inclusive")
    return Arm(
        name=name,
        tok_per_s=median(samples.rates),
        p50_s=cuts[49],
        p99_s=cuts[98],
        ttft_p50_s=median(samples.ttft),
        experts_paged=samples.experts // runs,
        bytes_paged=samples.bytes // runs,
        union=union,
        runs=runs,
    )


def _ratios(samples: Mapping[str, _Samples]) -> dict[str, float]:
    def ratio(above: str, below: str) -> float:
        pairs = zip(samples[above].rates, samples[below].rates, strict=True)
        return median(ours / theirs for ours, theirs in pairs)

    return {
        "mixed_to_single": ratio("mixed", "single"),
        "mixed_to_swap": ratio("mixed", "swap"),
        "mixed_to_scheduled": ratio("mixed", "scheduled"),  # what one batch of all tasks is worth beyond batching
        "scheduled_to_swap": ratio("scheduled", "swap"),
    }
