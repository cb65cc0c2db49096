"""Experts in strips, and in four bits, beside whole ones at equal bytes, on the demo's held-out test items.

One pack of the bundled model for each number of strips, in one order of channels for all tasks, as `moepager pack`
makes it, and such packs as `moepager quantise` copies them; each task's experts as `moepager profile --search` chooses
them by evaluation items; what is chosen is then measured on the test items, which no choice has seen. A folder keeps
packs, profiles and measurements.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.quality_grid import Grid
from benchmarks.quality_runs import Runs
from demo.prepare import DTYPE, THREADS, corpus, pooled_corpus
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from profiler.allocation import choose_allocators, kept, select
from profiler.batches import encode_corpus
from profiler.evaluate import Measured, judged_role
from profiler.evidence import HeldOut
from profiler.forced import evaluate_forced
from profiler.job import profile_task
from profiler.options import Options
from profiler.pack_job import pack_task
from profiler.pack_recipes import InStrips
from profiler.pack_ways import Pack
from profiler.price import best_by_size
from profiler.progress import Report
from profiler.quantise import quantise_model
from profiler.scorers.registry import choose
from profiler.statistics import Statistics
from store.database import Store, open_store
from store.errors import InvalidInput
from store.home import bundled_model
from store.quantisation import GROUP, MXFP4
from store.records import Profile, Selection, TaskRecord

WIDE, FOUR = 16, 4  # bits of an expert's weight
ORDER = "camera"  # of the channels in the packs
SCORERS = ("camera", "easy_ep", "easy_ep_answers", "gate_answers", "peu")
ALLOCATORS = ("coverage", "global")
AUTOMATIC, ALONE = "automatic", ("camera", "global")  # the search's choice, and one way for all, chosen by nothing
KEEPS = (0.25, 0.125, 0.0625, 0.03125)
ROWS, CONTEXT = 50, 256
ALL = "all"  # the name that the packs' text has, of all tasks together
ITEMS = 96  # a task in it


@dataclass(frozen=True, slots=True)
class Wish:
    """What is measured, and by which scorers and allocators the search chooses. `quantised`: the numbers of strips that
    are measured in four bits, too; `keeps` are shares of the bundled model's bytes."""

    strips: tuple[int, ...] = (1, 4, 12)
    keeps: tuple[float, ...] = KEEPS
    tasks: tuple[str, ...] = Grid().tasks
    items: int = 40
    scorers: tuple[str, ...] = SCORERS
    allocators: tuple[str, ...] = ALLOCATORS
    quantised: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        Grid(items=self.items, tasks=self.tasks)  # refuses tasks that are none
        choose(self.scorers)
        choose_allocators(self.allocators)
        for count in (*self.strips, *self.quantised):
            if count > 1:
                InStrips(np.zeros((1, 1, _width())), count, share=1.0)  # refuses numbers that do not divide an expert
        for count in self.quantised:
            if _width() // count % GROUP:
                raise InvalidInput(
                    f"{count} strips of an expert's {_width()} channels have {_width() // count} each, and {GROUP} "
                    "share an exponent in four bits. Choose a number that leaves whole groups, such as 1.",
                    param="quantised",
                )
        for keep in self.keeps:
            kept(1, keep, 1)

    @property
    def digest(self) -> str:
        """Of what a choice depends on: evidence of other scorers would take part in it."""
        return hashlib.sha256(repr((self.scorers, self.allocators)).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class StripRow:
    """`whole` is the accuracy of the whole pack; `chosen` the scorer and allocator of the selection, `bytes` those of
    its experts as they are stored."""

    strips: int
    bits: int
    keep: float
    way: str
    task: str
    chosen: str
    items: int
    accuracy: float
    whole: float
    nll: float
    coverage: float
    bytes: int


@dataclass(frozen=True, slots=True)
class StripMean:
    """Over tasks; `worst` is the task that has the lowest accuracy."""

    strips: int
    bits: int
    keep: float
    way: str
    accuracy: float
    worst: float
    worst_task: str
    whole: float
    nll: float
    tasks: int


def bench_strips(wish: Wish, report: Report, folder: Path | None = None) -> list[StripRow]:
    """A size that has no room for one token's experts has no row."""
    rows: list[StripRow] = []
    with tempfile.TemporaryDirectory(prefix="moepager-strips-") as beside:
        results = folder or Path(beside)
        results.mkdir(parents=True, exist_ok=True)
        with open_store(f"sqlite:///{results / f'profiles-{wish.digest}.db'}") as store:
            for count, bits in [
                *((count, WIDE) for count in wish.strips),
                *((count, FOUR) for count in wish.quantised),
            ]:
                model = _model(store, results, count, report)
                if bits == FOUR:
                    model = _quantised(model, results / f"pack-{count}-four-bits", report)
                with Engine.open(_config(model, DTYPE)) as engine:
                    for task in wish.tasks:
                        rows += _Bench(engine, store, wish, task, results, report).rows()
    return rows


def _width() -> int:
    """Channels of one of the bundled model's experts, whose every part is a matrix of them by hidden numbers."""
    card = ModelCard.read(bundled_model())
    return card.geometry.expert[0] // card.hidden


def _model(store: Store, results: Path, strips: int, report: Report) -> Path:
    """The pack in so many strips, made once; one strip is the model itself."""
    if strips == 1:
        return bundled_model()
    folder = results / f"pack-{strips}"
    if not folder.exists():
        texts = pooled_corpus("calibration", ITEMS), None
        options = Options(rows=ROWS, runs=results / "runs", model_name="demo")
        config = _config(bundled_model(), "auto")  # as `moepager pack` opens it: a pack has the checkpoint's own type
        pack_task(config, store, TaskRecord(ALL), texts, Pack(ORDER, strips=strips), folder, options, report)
    return folder


def _quantised(model: Path, folder: Path, report: Report) -> Path:
    if not folder.exists():
        quantise_model(model, folder, MXFP4, lambda _: {}, report)
    return folder


def _config(model: Path, dtype: str) -> EngineConfig:
    return EngineConfig(model, max_context=CONTEXT, max_batch=ROWS, dtype=dtype, threads=THREADS)


class _Bench:
    """One task of one model."""

    def __init__(
        self, engine: Engine, store: Store, wish: Wish, task: str, results: Path, report: Report
    ) -> None:  # fmt: skip
        self._engine, self._store, self._wish, self._task = engine, store, wish, task
        self._runs_folder, self._report = results / "runs", report
        self._runs = Runs(results, engine.card.fingerprint, task)
        self._test = encode_corpus(engine, corpus(task, "test", wish.items))

    def rows(self) -> Iterator[StripRow]:
        if not self._keeps:
            return
        profile = self._profile()
        statistics = Statistics.from_arrays(profile.statistics)
        sizes = [self._engine.plan.slot_bytes] * statistics.layers
        judged = HeldOut((), corpus(self._task, "evaluation").content_hash, ROWS)
        chosen = {stored.keep: stored for stored, _ in best_by_size(self._store, profile, judged)}
        scorer, allocator = choose([ALONE[0]])[0], ALONE[1]
        for keep, share in self._keeps.items():
            best = chosen[share]
            yield self._row(keep, AUTOMATIC, f"{best.scorer}, {best.allocator}", best.selection)
            alone = select(scorer, allocator, statistics, share, sizes, self._engine.card.strips)
            yield self._row(keep, ", ".join(ALONE), ", ".join(ALONE), alone)

    @cached_property
    def _keeps(self) -> dict[float, float]:
        """Shares of the bundled model's bytes that are enough for one token, where a smaller one would be rounded up to
        that, and the shares of the pack's experts that they are."""
        card = self._engine.card
        times = ModelCard.read(bundled_model()).expert_bytes / (card.expert_bytes * card.strips)
        shares = {keep: min(1.0, round(keep * times, 4)) for keep in self._wish.keeps}
        return {
            keep: share
            for keep, share in shares.items()
            if kept(card.experts, share, card.least) <= share * card.experts + 0.5
        }

    def _profile(self) -> Profile:
        wish = self._wish
        options = Options(
            scorers=wish.scorers,
            allocators=wish.allocators,
            keeps=list(self._keeps.values()),
            extras=choose([ALONE[0]])[0].needs,
            rows=ROWS,
            runs=self._runs_folder,
            search=True,
        )
        texts = corpus(self._task, "calibration"), corpus(self._task, "evaluation")
        return profile_task(
            self._engine,
            self._store,
            TaskRecord(self._task),
            *texts,
            embedder=HashEmbedder(),  # of queries, which nobody here asks
            options=options,
            report=self._report,
        )

    def _row(self, keep: float, way: str, chosen: str, selection: Selection) -> StripRow:
        whole, here = self._measured(None), self._measured(selection)
        return StripRow(
            strips=self._engine.card.strips,
            bits=FOUR if self._engine.card.geometry.packed else WIDE,
            keep=keep,
            way=way,
            task=self._task,
            chosen=chosen,
            items=here.items,
            accuracy=here.accuracy or 0.0,
            whole=whole.accuracy or 0.0,
            nll=here.nll,
            coverage=here.coverage,
            bytes=len(selection) * self._engine.card.expert_bytes,
        )

    def _measured(self, selection: Selection | None) -> Measured:
        role = judged_role(self._test)
        return self._runs.measured(
            self._test, selection, lambda part: evaluate_forced(self._engine, part, selection, ROWS, role)
        )


def strip_means(rows: Sequence[StripRow]) -> list[StripMean]:
    """Each way's whole experts first, then its strips; of each the largest size first."""
    groups: dict[tuple[str, int, int, float], list[StripRow]] = {}
    for row in rows:
        groups.setdefault((row.way, row.bits, row.strips, row.keep), []).append(row)
    found = [_mean(group) for group in groups.values()]
    return sorted(found, key=lambda mean: (mean.way, -mean.bits, mean.strips, -mean.keep))


def _mean(group: Sequence[StripRow]) -> StripMean:
    worst = min(group, key=lambda row: (row.accuracy, row.task))
    return StripMean(
        strips=worst.strips,
        bits=worst.bits,
        keep=worst.keep,
        way=worst.way,
        accuracy=fmean(row.accuracy for row in group),
        worst=worst.accuracy,
        worst_task=worst.task,
        whole=fmean(row.whole for row in group),
        nll=fmean(row.nll for row in group),
        tasks=len(group),
    )
