"""Cold paging of a selection, beside a raw direct read of the same bytes from the same places.

Two disjoint random selections take turns in a bank that holds just one of them, so that every lease reads all of its
bytes. Runs are interleaved (raw, paged, raw, paged ...); files are evicted from the page cache before each, and the
eviction is checked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.own_counters import device_bytes
from benchmarks.page_cache import evict
from benchmarks.raw_read import Range, Shape, best_shape, lanes, merged, read_seconds
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput
from store.experts import ExpertMap
from store.records import Selection


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Medians over the runs, GB being 1e9 bytes; `ratio_to_raw` is the median of the ratios run by run."""

    model: str
    keep: float
    experts: int
    bytes: int
    seconds: float
    gb_per_s: float
    raw_seconds: float
    raw_gb_per_s: float
    ratio_to_raw: float
    raw_block: int
    raw_depth: int
    read_amplification: float
    cpu_seconds_per_gib: float
    runs: int


def bench_load(model: Path, keep: float, runs: int, seed: int = 0) -> LoadFigures:
    if not 0 < keep <= 0.5:
        raise InvalidInput(
            f"--keep must be above 0 and at most 0.5, so that two disjoint selections exist; got {keep}.", param="keep"
        )
    card = ModelCard.read(model)
    experts = ExpertMap.build(CheckpointMap.open(model))
    turns = disjoint_selections(card, max(card.top_k, int(keep * card.experts)), seed)
    files = sorted({range_.file for turn in turns for range_ in _ranges(experts, turn)})
    memory = plan_memory(card, _config(model, None)).memory_for(len(turns[0]) / (card.layers * card.experts))
    shape = best_shape(_ranges(experts, turns[0]))
    with Engine.open(_config(model, memory)) as engine:
        samples = [_run(engine, experts, turns[number % 2], files, shape) for number in range(runs + 2)][
            2:
        ]  # two to fill and warm up
    return _figures(model, keep, experts, turns[0], shape, samples)


def disjoint_selections(card: ModelCard, per_layer: int, seed: int) -> tuple[Selection, Selection]:
    rng = random.Random(seed)
    orders = [rng.sample(range(card.experts), card.experts) for _ in range(card.layers)]
    first = Selection.of([order[:per_layer] for order in orders])
    second = Selection.of([order[per_layer : 2 * per_layer] for order in orders])
    if len(first) != len(second):
        raise InvalidInput(
            f"Two disjoint selections of {per_layer} experts a layer need {2 * per_layer}; there are {card.experts}.",
            param="keep",
        )
    return first, second


@dataclass(frozen=True, slots=True)
class _Sample:
    raw_seconds: float
    seconds: float
    cpu_seconds: float
    bytes_paged: int
    bytes_read: int  # from the device, by the kernel's own count


def _run(engine: Engine, experts: ExpertMap, turn: Selection, files: Sequence[Path], shape: Shape) -> _Sample:
    evict(files)
    raw = read_seconds(_ranges(experts, turn), shape, lanes(shape))
    evict(files)
    before, cpu, started = device_bytes(), time.process_time(), time.perf_counter()
    with engine.lease(turn) as lease:
        seconds = time.perf_counter() - started
        used = time.process_time() - cpu
        if lease.bytes_paged != experts.selection_bytes(turn):
            raise AssertionError(
                f"{lease.bytes_paged} bytes were paged for a selection of {experts.selection_bytes(turn)}"
            )
        return _Sample(raw, seconds, used, lease.bytes_paged, device_bytes() - before)


def _figures(
    model: Path, keep: float, experts: ExpertMap, turn: Selection, shape: Shape, samples: Sequence[_Sample]
) -> LoadFigures:
    size = experts.selection_bytes(turn)
    seconds, raw = median(s.seconds for s in samples), median(s.raw_seconds for s in samples)
    return LoadFigures(
        model=model.name,
        keep=keep,
        experts=len(turn),
        bytes=size,
        seconds=seconds,
        gb_per_s=size / seconds / 1e9,
        raw_seconds=raw,
        raw_gb_per_s=size / raw / 1e9,
        ratio_to_raw=median(s.raw_seconds / s.seconds for s in samples),
        raw_block=shape.block,
        raw_depth=shape.depth,
        read_amplification=median(s.bytes_read / s.bytes_paged for s in samples),
        cpu_seconds_per_gib=median(s.cpu_seconds for s in samples) / (size / 2**30),
        runs=len(samples),
    )


def _ranges(experts: ExpertMap, selection: Selection) -> list[Range]:
    return merged([Range(part.file, part.offset, part.nbytes) for key in selection for part in experts.span(key).parts])


def _config(model: Path, memory: int | None) -> EngineConfig:
    return EngineConfig(model, memory=memory, max_context=256, max_batch=1, chunk_tokens=256)
