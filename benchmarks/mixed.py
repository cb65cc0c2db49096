"""Several tasks at once: one batch that mixes them, beside traffic of one task and beside a swap for every request.

Every arm answers the same number of requests with equally many tokens, from as many clients, each of which sends its
next request when it has its answer. Arms take turns; experts are resident before an arm is timed, except where swapping
them is what the arm is about.

An arm's decode steps are clocked; what they touch is counted from their routing afterwards, in passes that are not.

mixed      requests of all tasks in one batch, over a bank that holds the union of their selections
by_age     the same where fewer rows than clients make kinship matter, and the scheduler does not heed it
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
from math import inf
from pathlib import Path
from statistics import median, quantiles

from benchmarks.mixed_steps import Clock, StepWeights, Touched, around_steps
from benchmarks.mixed_tasks import Task, Work, tasks_of
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from engine.scheduler import Rules
from engine.worker import EngineWorker

ARMS = ("mixed", "single", "swap", "scheduled")
BY_AGE = Rules(kin_share=inf)


@dataclass(frozen=True, slots=True)
class Arm:
    """`tok_per_s` is the median over the runs, `low` and `high` are the slowest and the fastest; latencies are those of
    all requests, from asking to the last token; what was paged is a run's, in the mean; `union` is how many experts the
    tasks have together.

    Of a run, in the mean: the engine thread's processor seconds in decode steps and in prompts' passes, and seconds of
    reads for swaps, which prompts' passes may overlap. Of a decode step, in the mean: its rows, the distinct experts of
    all layers that they were routed to, and the bytes of these and of the dense weights.
    """

    name: str
    tok_per_s: float
    low: float
    high: float
    p50_s: float
    p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    decode_s: float
    prompt_s: float
    read_s: float
    step_rows: float
    step_experts: float
    step_bytes: float
    experts_paged: int
    bytes_paged: int
    union: int
    runs: int


@dataclass(slots=True)
class _Samples:
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)
    read: float = 0.0
    experts: int = 0
    bytes: int = 0


def arms_of(work: Work) -> tuple[str, ...]:
    """Where every client has a row there is nobody to choose from."""
    return (*ARMS, "by_age") if work.batch_rows < work.clients else ARMS


def bench_mixed(model: Path, work: Work, runs: int) -> tuple[list[Arm], dict[str, float]]:
    """The arms, and ratios of their rates: medians of the ratios run by run."""
    card = ModelCard.read(model)
    tasks = tasks_of(model, card, work)
    union = len({key for task in tasks for key in task.selection})
    largest = max(len(task.selection) for task in tasks)
    samples = {name: _Samples() for name in arms_of(work)}
    with _engine(model, work, union) as wide, _engine(model, work, largest) as narrow:
        for run in range(-1, runs):  # one to warm up
            for name, requests, engine, serve in _turns(tasks, work, run, wide, narrow):
                if engine is wide:
                    _fill(engine, tasks)
                _measure(samples[name] if run >= 0 else _Samples(), requests, engine, serve)
        touched = _count(tasks, work, wide, narrow)
        weights = StepWeights.of(wide)
    arms = [_arm(name, samples[name], touched[name], weights, union, runs) for name in arms_of(work)]
    return arms, _ratios(samples) | _limits({arm.name: arm for arm in arms})


Serve = Callable[[Engine, Sequence[GenerationRequest]], Iterator[tuple[float, FinishedEvent]]]


def _turns(
    tasks: Sequence[Task], work: Work, run: int, wide: Engine, narrow: Engine
) -> Iterator[tuple[str, Sequence[GenerationRequest], Engine, Serve]]:
    clients = _clients(work.clients)
    yield "mixed", _requests(tasks, work, run), wide, clients
    if "by_age" in arms_of(work):
        yield "by_age", _requests(tasks, work, run), wide, _clients(work.clients, BY_AGE)
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
    with around_steps(engine, samples.clock.around):
        answers = list(serve(engine, requests))
    samples.rates.append(sum(done.completion_tokens for _, done in answers) / (time.perf_counter() - started))
    samples.seconds += [seconds for seconds, _ in answers]
    samples.ttft += [done.served.ttft_ms / 1000 for _, done in answers]
    samples.read += sum(done.served.swap_ms for _, done in answers) / 1000
    now = engine.residency()
    samples.experts += now.experts_paged - before.experts_paged
    samples.bytes += now.bytes_paged - before.bytes_paged


def _count(tasks: Sequence[Task], work: Work, wide: Engine, narrow: Engine) -> dict[str, Touched]:
    """What every arm's decode steps touch, in one pass; a single task's in one of each task."""
    touched = {name: Touched(wide.card.experts) for name in arms_of(work)}
    _fill(wide, tasks)
    for run in range(len(tasks)):
        for name, requests, engine, serve in _turns(tasks, work, run, wide, narrow):
            if run == 0 or name == "single":
                with around_steps(engine, touched[name].around):
                    list(serve(engine, requests))
    return touched


def _one_by_one(engine: Engine, requests: Sequence[GenerationRequest]) -> Iterator[tuple[float, FinishedEvent]]:
    for request in requests:
        started = time.perf_counter()
        [done] = [event for event in engine.generate([request]) if isinstance(event, FinishedEvent)]
        yield time.perf_counter() - started, done


def _clients(count: int, rules: Rules | None = None) -> Serve:
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
                done = worker.submit(request).end()
                answers.append((time.perf_counter() - started, done))

        with EngineWorker(engine, queue_size=count, rules=rules) as worker:
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
    fields = {"max_batch": work.batch_rows, "chunk_tokens": 512, "dtype": work.dtype, "threads": work.threads}
    context = min(ModelCard.read(model).max_context, max(256, work.prompt_tokens + work.tokens))
    plan = plan_memory(ModelCard.read(model), EngineConfig(model, memory=None, max_context=context, **fields))  # type: ignore[arg-type]
    memory = plan.fixed_bytes + slots * plan.slot_bytes
    config = EngineConfig(model, memory=memory, max_context=context, **fields)  # type: ignore[arg-type]
    with Engine.open(config) as engine:
        yield engine


def _arm(name: str, samples: _Samples, touched: Touched, weights: StepWeights, union: int, runs: int) -> Arm:
    cuts, ttft = (quantiles(each, n=100, method="inclusive") for each in (samples.seconds, samples.ttft))
    experts = touched.hits / touched.steps
    return Arm(
        name=name,
        tok_per_s=median(samples.rates),
        low=min(samples.rates),
        high=max(samples.rates),
        p50_s=cuts[49],
        p99_s=cuts[98],
        ttft_p50_s=ttft[49],
        ttft_p99_s=ttft[98],
        decode_s=samples.clock.decode_s / runs,
        prompt_s=samples.clock.prompt_s / runs,
        read_s=samples.read / runs,
        step_rows=touched.tokens / touched.steps,
        step_experts=experts,
        step_bytes=experts * weights.expert + weights.dense,
        experts_paged=samples.experts // runs,
        bytes_paged=samples.bytes // runs,
        union=union,
        runs=runs,
    )


def _ratios(samples: Mapping[str, _Samples]) -> dict[str, float]:
    def ratio(above: str, below: str) -> float:
        pairs = zip(samples[above].rates, samples[below].rates, strict=True)
        return median(ours / theirs for ours, theirs in pairs)

    by_age = {"mixed_to_by_age": ratio("mixed", "by_age")} if "by_age" in samples else {}
    return by_age | {
        "mixed_to_single": ratio("mixed", "single"),
        "mixed_to_swap": ratio("mixed", "swap"),
        "mixed_to_scheduled": ratio("mixed", "scheduled"),  # what one batch of all tasks is worth beyond batching
        "scheduled_to_swap": ratio("scheduled", "swap"),
    }


def _limits(arms: Mapping[str, Arm]) -> dict[str, float]:
    """What memory and disk allow: decoding in batches of all tasks over that of one by the bytes that a token's share
    of a step reads, and what reading adds to the decoding of a swap a request."""
    single, mixed = (arms[name].step_bytes / arms[name].step_rows for name in ("single", "mixed"))
    return {
        "mixed_to_single_by_bytes": single / mixed,
        "mixed_to_single_decoding": arms["single"].decode_s / arms["mixed"].decode_s,
        "swap_reading_to_decoding": arms["swap"].read_s / arms["swap"].decode_s,
    }
