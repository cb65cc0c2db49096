"""Time to first token of a request whose experts are all on the disk, beside reading them and computing the prompt.

Three arms a prompt length, taking turns: *read* leases the selection and does nothing else, *prefill* is the request
with its experts in memory, *cold* is the request with none of them there. Reading and computing overlap where a cold
request takes less than both one after the other; they overlap wholly where it takes as long as the longer of the two.
Files are evicted from the page cache before every read, and the eviction is checked.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.load import disjoint_selections
from benchmarks.page_cache import evict
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from engine.requests import FinishedEvent, GenerationRequest, Sampling, Served
from engine.worker import EngineWorker
from store.checkpoint import CheckpointMap
from store.records import Selection

WARM_UP = 1  # rounds that count for nothing


@dataclass(frozen=True, slots=True)
class TtftFigures:
    """Medians over the runs; the ratios are medians of the ratios run by run.

    `over_max` is cold over the longer of read and prefill, `over_sum` cold over both. `waited_s` is how long the cold
    pass stood still for experts: what is left of cold above prefill is shared cores. `predicted_over_read` is what the
    request was told of its swap beforehand over what reading takes.
    """

    prompt_tokens: int
    bytes: int
    read_s: float
    prefill_s: float
    cold_s: float
    waited_s: float
    over_max: float
    over_sum: float
    predicted_over_read: float
    runs: int


@dataclass(frozen=True, slots=True)
class _Sample:
    read: float
    prefill: float
    cold: float
    waited: float
    predicted: float
    bytes: int


def bench_ttft(model: Path, keep: float, lengths: Sequence[int], runs: int, seed: int = 0) -> list[TtftFigures]:
    card = ModelCard.read(model)
    selection = disjoint_selections(card, max(card.top_k, int(keep * card.experts)), seed)[0]
    files = CheckpointMap.open(model).files
    rng = random.Random(seed)
    prompts = [tuple(rng.randrange(card.vocab) for _ in range(length)) for length in lengths]
    samples: list[list[_Sample]] = [[] for _ in prompts]
    with Engine.open(_config(model, card, keep, max(lengths))) as engine, EngineWorker(engine) as worker:
        for run in range(WARM_UP + runs):
            for prompt, found in zip(prompts, samples, strict=True):
                sample = _run(worker, files, GenerationRequest(prompt, selection, "mask", Sampling(max_tokens=1)))
                if run >= WARM_UP:
                    found.append(sample)
    return [_figures(len(prompt), found) for prompt, found in zip(prompts, samples, strict=True)]


def _run(worker: EngineWorker, files: Sequence[Path], request: GenerationRequest) -> _Sample:
    read = _read(worker, files, request.selection or Selection.of([]))
    prefill = _ask(worker, request, paged=0)
    worker.run(Engine.evict).result()
    evict(files)
    before = worker.run(_waited).result()
    cold = _ask(worker, request, paged=len(request.selection or ()))
    return _Sample(
        read,
        prefill.ttft_ms / 1000,
        cold.ttft_ms / 1000,
        worker.run(_waited).result() - before,
        cold.predicted.seconds if cold.predicted else 0.0,
        cold.bytes_paged,
    )


def _read(worker: EngineWorker, files: Sequence[Path], selection: Selection) -> float:
    worker.run(Engine.evict).result()
    evict(files)

    def lease(engine: Engine) -> float:
        with engine.lease(selection) as held:
            return held.seconds

    return worker.run(lease).result()


def _waited(engine: Engine) -> float:
    return engine.bank.paged.waited


def _ask(worker: EngineWorker, request: GenerationRequest, paged: int) -> Served:
    *_, done = worker.submit(request)
    if not isinstance(done, FinishedEvent) or done.served.experts_paged != paged:
        raise AssertionError(f"{paged} experts had to be paged in; the answer was {done}")
    return done.served


def _figures(prompt: int, samples: Sequence[_Sample]) -> TtftFigures:
    return TtftFigures(
        prompt_tokens=prompt,
        bytes=samples[0].bytes,
        read_s=median(s.read for s in samples),
        prefill_s=median(s.prefill for s in samples),
        cold_s=median(s.cold for s in samples),
        waited_s=median(s.waited for s in samples),
        over_max=median(s.cold / max(s.read, s.prefill) for s in samples),
        over_sum=median(s.cold / (s.read + s.prefill) for s in samples),
        predicted_over_read=median(s.predicted / s.read for s in samples),
        runs=len(samples),
    )


def _config(model: Path, card: ModelCard, keep: float, longest: int) -> EngineConfig:
    """A budget that holds the selection and no more."""
    generous = EngineConfig(model, memory=2**50, max_context=longest + 16, max_batch=1)
    return EngineConfig(
        model, memory=plan_memory(card, generous).memory_for(keep), max_context=longest + 16, max_batch=1
    )
