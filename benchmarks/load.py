"""Cold paging of a selection, beside a raw direct read of the same bytes from the same places and other readers.

Two disjoint random selections take turns in a bank that holds just one of them, so that every lease reads all of its
bytes. Every arm stands between two raw reads of the same bytes, and its ratio is taken to these two (paired.py); a run
begins with one more, not counted, since the host may keep what was read last. Runs have the arms in another order.
Files are evicted from the page cache before each read, and the eviction is checked. `raw` is the limit: it drops what
it reads. `own` is the engine's lease, into the bank. The others (load_readers.py, load_peers.py) fill an arena that
was touched before, and what they brought is checked.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.load_pieces import Arena, Read, arena_bytes, check, pieces, true_sums
from benchmarks.load_readers import READERS
from benchmarks.own_counters import anonymous_bytes, device_bytes
from benchmarks.page_cache import PAGE, evict, resident_pages
from benchmarks.paired import PairedRatio, pair_ratio, paired_ratio
from benchmarks.raw_read import Range, Shape, best_shape, is_direct, lanes, merged, read_seconds
from benchmarks.watch import Watch
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput
from store.experts import ExpertMap
from store.records import Selection

Arm = Callable[[Selection], AbstractContextManager[None]]  # it has read when the block begins
WARM_UP = 2  # runs, one for each selection


@dataclass(frozen=True, slots=True)
class ReaderFigures:
    """Medians over the runs; of `raw`, over all of its reads.

    `ratio_to_raw` is the median of the pairs' ratios, above 1 where it is faster than raw, and lies between `ratio_low`
    and `ratio_high` with LoadFigures' `ratio_confidence`. `read_amplification` is what the device gave over the
    selection's bytes. `cache_left_bytes` is what stays in the page cache, by mincore, of the files read. `anon_bytes`
    is the most anonymous memory that a read took beyond the arena and what was held since opening (of `direct` its
    four buffers, which the plan counts), seen in runs that are not timed. None of raw and own: own reads as `direct`.
    """

    name: str
    seconds: float
    gb_per_s: float
    ratio_to_raw: float
    ratio_low: float
    ratio_high: float
    cpu_seconds_per_gib: float
    read_amplification: float
    cache_left_bytes: int
    anon_bytes: int | None


@dataclass(frozen=True, slots=True)
class LoadFigures:
    """Medians over the runs, GB being 1e9 bytes. Figures outside `readers` are those of `own` and `raw`.
    Where the file system refuses direct reads, both are buffered, and say so."""

    model: str
    keep: float
    experts: int
    bytes: int
    seconds: float
    gb_per_s: float
    raw_seconds: float
    raw_gb_per_s: float
    ratio_to_raw: float
    ratio_low: float
    ratio_high: float
    ratio_confidence: float
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


@dataclass(slots=True)
class _Samples:
    """Of one arm: what was measured run by run, and each beside the raw reads around it."""

    taken: list[_Sample] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    anon: int | None = None


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
    found = {name: _reader_figures(name, own, size) for name, own in samples.items()}
    return _figures(model, keep, len(turns[0]), shape, found, _ratio(samples["own"]).confidence, size, runs, ways)


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
) -> dict[str, _Samples]:
    samples = {name: _Samples() for name in arms}
    others = [name for name in arms if name != "raw"]
    for run in range(WARM_UP):
        for name in arms:
            evict(files)
            _warm_up(name, arms[name], turns[run % 2], samples[name])
    for run in range(runs):
        first = run % len(others)
        _measure_run(arms, others[first:] + others[:first], turns[run % 2], files, samples)
    return samples


def _warm_up(name: str, arm: Arm, turn: Selection, samples: _Samples) -> None:
    before = anonymous_bytes()
    with Watch(lambda: (anonymous_bytes(), 0)) as watch, arm(turn):
        pass
    if name in READERS:
        samples.anon = max(samples.anon or 0, watch.anon - before)


def _measure_run(
    arms: Mapping[str, Arm],
    names: Sequence[str],
    turn: Selection,
    files: Sequence[Path],
    samples: Mapping[str, _Samples],
) -> None:
    def measured(name: str) -> _Sample:
        evict(files)
        return _measure(arms[name], turn, files)

    measured("raw")
    before = measured("raw")
    samples["raw"].taken.append(before)
    for name in names:
        sample, after = measured(name), measured("raw")
        samples[name].taken.append(sample)
        samples[name].ratios.append(pair_ratio(before.seconds, sample.seconds, after.seconds))
        samples["raw"].taken.append(after)
        before = after


def _measure(arm: Arm, turn: Selection, files: Sequence[Path]) -> _Sample:
    before, cpu, started = device_bytes(), time.process_time(), time.perf_counter()
    with arm(turn):
        seconds, used = time.perf_counter() - started, time.process_time() - cpu
        read = device_bytes() - before
        return _Sample(seconds, used, read, PAGE * sum(resident_pages(file) for file in files))


def _reader_figures(name: str, samples: _Samples, size: int) -> ReaderFigures:
    taken = samples.taken
    seconds = median(sample.seconds for sample in taken)
    ratio = _ratio(samples)
    return ReaderFigures(
        name=name,
        seconds=seconds,
        gb_per_s=size / seconds / 1e9,
        ratio_to_raw=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        cpu_seconds_per_gib=median(sample.cpu_seconds for sample in taken) / (size / 2**30),
        read_amplification=median(sample.bytes_read for sample in taken) / size,
        cache_left_bytes=int(median(sample.cache_left for sample in taken)),
        anon_bytes=samples.anon,
    )


def _ratio(samples: _Samples) -> PairedRatio:
    return paired_ratio(samples.ratios or [1.0])  # raw is what the others are compared with


def _figures(
    model: Path,
    keep: float,
    experts: int,
    shape: Shape,
    found: Mapping[str, ReaderFigures],
    confidence: float,
    size: int,
    runs: int,
    ways: tuple[str, str],
) -> LoadFigures:
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
        ratio_low=own.ratio_low,
        ratio_high=own.ratio_high,
        ratio_confidence=confidence,
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
