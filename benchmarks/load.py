"""Cold paging of a selection, beside a raw direct read of the same bytes from the same places and other readers.

Two disjoint random selections take turns in a bank that holds just one of them, so that every lease reads all of its
bytes. Arms take turns in every run, each run in another order, and every arm has `raw` just before and just after it:
a disk drifts within a minute by more than readers differ, so each is held to the mean of its two neighbours alone.
Files are evicted from the page cache before each arm, and the eviction is checked. `raw` is the limit: it drops what it
reads. `own` is the engine's lease, into the bank. The others (benchmarks/load_readers.py, load_peers.py) fill an arena
that was touched before, and what they brought is checked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks.load_peers import fastsafetensors, runai
from benchmarks.load_readers import OURS, Arena, Read, arena_bytes, check, pieces, true_sums
from benchmarks.own_counters import device_bytes
from benchmarks.page_cache import PAGE, evict, resident_pages
from benchmarks.raw_read import Range, Shape, best_shape, is_direct, lanes, merged, read_seconds
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput
from store.experts import ExpertMap
from store.records import Selection

Arm = Callable[[Selection], AbstractContextManager[None]]  # it has read when the block begins
READERS = {**OURS, "runai": runai, "fastsafetensors": fastsafetensors}
WARM_UP = 2  # runs, one for each selection


@dataclass(frozen=True, slots=True)
class ReaderFigures:
    """Medians over the runs. `cache_left_bytes` is what stays in the page cache, by mincore, of the files read.

    `ratio_to_raw` is the median over the runs of the raw reads just before and after, over the reader; `ratio_least`
    and `ratio_most` are the extremes, between which the true median lies with 1 - 2 / 2^runs (94% of five runs).
    """

    name: str
    seconds: float
    gb_per_s: float
    ratio_to_raw: float
    ratio_least: float
    ratio_most: float
    cpu_seconds_per_gib: float
    read_amplification: float
    cache_left_bytes: int


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Medians over the runs, GB being 1e9 bytes; ratios as in ReaderFigures.

    Figures outside `readers` are those of `own` and `raw`. Where the file system refuses direct reads, both are
    buffered, and say so.
    """

    model: str
    keep: float
    experts: int
    bytes: int
    seconds: float
    gb_per_s: float
    raw_seconds: float
    raw_gb_per_s: float
    ratio_to_raw: float
    ratio_least: float
    ratio_most: float
    raw_block: int
    raw_depth: int
    read_amplification: float
    cpu_seconds_per_gib: float
    runs: int
    reads: str  # of `own`: direct, buffered or mixed
    raw_reads: str
    readers: tuple[ReaderFigures, ...]


@dataclass(frozen=True, slots=True)
class _Sample:
    seconds: float
    cpu_seconds: float
    bytes_read: int  # from the device, by the kernel's own count
    cache_left: int
    beside: float  # seconds of the raw reads just before and just after it, in the mean


def bench_load(model: Path, keep: float, runs: int, readers: Sequence[str] = (), seed: int = 0) -> LoadFigures:
    """`readers` are names of READERS, measured beside raw and own. Raises InvalidInput for another name or share,
    NotFound for a peer that is not installed."""
    if not 0 < keep <= 0.5:
        raise InvalidInput(
            f"--keep must be above 0 and at most 0.5, so that two disjoint selections exist; got {keep}.", param="keep"
        )
    if unknown := sorted(set(readers) - READERS.keys()):
        raise InvalidInput(
            f"No reader {unknown[0]!r}; beside raw and own there are {', '.join(READERS)}.", param="reader"
        )
    card, checkpoint = ModelCard.read(model), CheckpointMap.open(model)
    experts = ExpertMap.build(checkpoint)
    turns = disjoint_selections(card, max(card.top_k, int(keep * card.experts)), seed)
    files = sorted({range_.file for turn in turns for range_ in _parts(experts, turn)})
    shape = best_shape(merged(_parts(experts, turns[0])))
    with ExitStack() as stack:
        arms: dict[str, Arm] = {"raw": _raw(experts, shape)}
        engine = stack.enter_context(Engine.open(_fitting(model, card, turns[0])))
        arms["own"] = _own(engine, experts)
        arena = Arena(arena_bytes(part.length for part in _parts(experts, turns[0])) if readers else PAGE)
        for name in dict.fromkeys(readers):
            read = stack.enter_context(READERS[name](card))
            arms[name] = _other(name, read, checkpoint, experts, turns, arena)
        samples = _measure_all(arms, turns, files, runs)
        ways = engine.access.name, "direct" if is_direct(files) else "buffered"
    size = experts.selection_bytes(turns[0])
    return _figures(model, keep, len(turns[0]), shape, _reader_figures(samples, size), size, runs, ways)


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


def _raw(experts: ExpertMap, shape: Shape) -> Arm:
    buffers = lanes(shape)

    @contextmanager
    def arm(turn: Selection) -> Iterator[None]:
        read_seconds(merged(_parts(experts, turn)), shape, buffers)
        yield

    return arm


def _own(engine: Engine, experts: ExpertMap) -> Arm:
    @contextmanager
    def arm(turn: Selection) -> Iterator[None]:
        with engine.lease(turn) as lease:
            yield
            if lease.bytes_paged != experts.selection_bytes(turn):
                raise AssertionError(
                    f"{lease.bytes_paged} bytes were paged for a selection of {experts.selection_bytes(turn)}"
                )

    return arm


def _other(
    name: str, read: Read, checkpoint: CheckpointMap, experts: ExpertMap, turns: Sequence[Selection], arena: Arena
) -> Arm:
    wanted = {turn.digest: pieces(checkpoint, _parts(experts, turn), arena) for turn in turns}
    truth = {digest: true_sums(found) for digest, found in wanted.items()}

    @contextmanager
    def arm(turn: Selection) -> Iterator[None]:
        read(wanted[turn.digest])
        yield
        check(name, wanted[turn.digest], truth[turn.digest])
        arena.empty()

    return arm


def _measure_all(
    arms: Mapping[str, Arm], turns: Sequence[Selection], files: Sequence[Path], runs: int
) -> dict[str, list[_Sample]]:
    samples: dict[str, list[_Sample]] = {name: [] for name in arms}
    names = [name for name in arms if name != "raw"]
    for run in range(-WARM_UP, runs):
        turn, first = turns[run % 2], run % len(names)
        before = _measure(arms["raw"], turn, files)
        for name in names[first:] + names[:first]:
            sample = _measure(arms[name], turn, files)
            after = _measure(arms["raw"], turn, files)
            if run >= 0:
                samples[name].append(replace(sample, beside=(before.seconds + after.seconds) / 2))
                samples["raw"].append(replace(after, beside=after.seconds))
            before = after
    return samples


def _measure(arm: Arm, turn: Selection, files: Sequence[Path]) -> _Sample:
    evict(files)
    before, cpu, started = device_bytes(), time.process_time(), time.perf_counter()
    with arm(turn):
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
        read = device_bytes() - before
        return _Sample(seconds, used, read, PAGE * sum(resident_pages(file) for file in files), seconds)


def _reader_figures(samples: Mapping[str, Sequence[_Sample]], size: int) -> dict[str, ReaderFigures]:
    def figures(name: str, own: Sequence[_Sample]) -> ReaderFigures:
        seconds = median(sample.seconds for sample in own)
        ratios = [sample.beside / sample.seconds for sample in own]
        return ReaderFigures(
            name=name,
            seconds=seconds,
            gb_per_s=size / seconds / 1e9,
            ratio_to_raw=median(ratios),
            ratio_least=min(ratios),
            ratio_most=max(ratios),
            cpu_seconds_per_gib=median(sample.cpu_seconds for sample in own) / (size / 2**30),
            read_amplification=median(sample.bytes_read for sample in own) / size,
            cache_left_bytes=int(median(sample.cache_left for sample in own)),
        )

    return {name: figures(name, own) for name, own in samples.items()}


def _figures(
    model: Path, keep: float, experts: int, shape: Shape, found: Mapping[str, ReaderFigures], size: int, runs: int,
    ways: tuple[str, str],
) -> LoadFigures:  # fmt: skip
    own, raw = found["own"], found["raw"]
    return LoadFigures(
        model=model.name,
        keep=keep,
        experts=experts,
        bytes=size,
        seconds=own.seconds,
        gb_per_s=own.gb_per_s,
        raw_seconds=raw.seconds,
        raw_gb_per_s=raw.gb_per_s,
        ratio_to_raw=own.ratio_to_raw,
        ratio_least=own.ratio_least,
        ratio_most=own.ratio_most,
        raw_block=shape.block,
        raw_depth=shape.depth,
        read_amplification=own.read_amplification,
        cpu_seconds_per_gib=own.cpu_seconds_per_gib,
        runs=runs,
        reads=ways[0],
        raw_reads=ways[1],
        readers=tuple(found.values()),
    )


def _parts(experts: ExpertMap, selection: Selection) -> list[Range]:
    return [Range(part.file, part.offset, part.nbytes) for key in selection for part in experts.span(key).parts]


def _fitting(model: Path, card: ModelCard, selection: Selection) -> EngineConfig:
    """A budget that holds just as many experts as a selection has."""
    memory = plan_memory(card, _config(model, None)).memory_for(len(selection) / (card.layers * card.experts))
    return _config(model, memory)


def _config(model: Path, memory: int | None) -> EngineConfig:
    return EngineConfig(model, memory=memory, max_context=256, max_batch=1, chunk_tokens=256)
