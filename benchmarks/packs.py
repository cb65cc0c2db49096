"""Channel scorers, packs and stand-ins at equal bytes of experts, on the demo's held-out test items.

Every row is one way at one share of the experts' bytes on one task: a selection that the router is limited to, a
selection whose other experts are replaced by their mean outputs, or by the mean experts of their clusters, a packed
model, or one in which each expert has a width of its own, to the channel or in equal strips. Rows that a folder holds
are not measured again.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.overlays import ClusterStandIns, OwnStrips, OwnWidths
from demo.prepare import DTYPE, THREADS, corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import allocate, kept
from profiler.batches import encode_corpus
from profiler.channels import gradients
from profiler.channels.registry import CHANNEL_SCORERS
from profiler.channels.weights import of_weights
from profiler.draws import draw
from profiler.evaluate import Measured, judged_role
from profiler.extras import NOTHING, Needs
from profiler.forced import evaluate_forced
from profiler.gather import gather_statistics
from profiler.pack import write_pack
from profiler.pack_recipes import Recipe
from profiler.pack_ways import WAYS, Pack, make_recipe, pack_of, sampled_outputs
from profiler.progress import Progress, Report, ignore
from profiler.run import Run
from profiler.scorers.registry import choose as choose_scorers
from profiler.stand_ins import needs_of, pay
from profiler.statistics import Statistics
from store.errors import BudgetError
from store.home import bundled_model
from store.records import Selection
from store.stand_ins import KINDS

ROWS = 50
SCORERS = ("gate_answers", "gate", "peu", "mone", "frequency", "random")
ALLOCATOR = "coverage"
PACK = "pack"  # where others name what stands in
CLUSTERS = {"cluster_mean, one": 0.0, "cluster_mean, a quarter": 0.25}  # of the bytes for merged experts; at least one
OWN = ", own widths"
STRIPS = {", strips of a twelfth": 12, ", strips of a quarter": 4}  # of an expert's channels
ACROSS = frozenset({"heapr", "heapr_joint", "heapr_unit"})  # their unit is loss, the same in every layer
BOTH = {0.25: ((0.5, 0.5),), 0.125: ((0.5, 0.25), (0.25, 0.5))}  # shares of experts and channels, at equal bytes


@dataclass(frozen=True, slots=True)
class PackRow:
    way: str
    stand_in: str
    task: str
    keep: float
    draw: int
    items: int
    accuracy: float
    whole: float
    nll: float
    coverage: float


@dataclass(frozen=True, slots=True)
class PackMean:
    """Over tasks and draws."""

    way: str
    stand_in: str
    keep: float
    accuracy: float
    retention: float
    nll: float
    rows: int


def bench_packs(
    tasks: Sequence[str], keeps: Sequence[float], ways: Sequence[str], items: int | None, draws: int,
    report: Report, folder: Path | None = None,
) -> list[PackRow]:  # fmt: skip
    """Ways: names of profiler/pack_ways.py. `draws` 0 takes the whole calibration text, else so many samples of it."""
    with tempfile.TemporaryDirectory(prefix="moepager-packs-") as beside:
        results = folder or Path(beside)
        results.mkdir(parents=True, exist_ok=True)
        with _open(bundled_model(), DTYPE) as engine, _open(bundled_model(), "auto") as packer:
            found: list[PackRow] = []
            for number in range(1, draws + 1) if draws else [0]:
                for task in tasks:
                    bench = _Bench(engine, packer, task, number, items, results)
                    for row in bench.rows(keeps, ways):
                        found.append(row)
                        report(Progress(f"{task}, draw {number}", "evaluate", len(found), len(found)))
    return found


@contextmanager
def _open(folder: Path, dtype: str) -> Iterator[Engine]:
    config = EngineConfig(folder, max_context=256, max_batch=ROWS, dtype=dtype, threads=THREADS, stand_ins=1)
    with Engine.open(config) as engine:
        yield engine


class _Bench:
    """One task and one draw of its calibration text."""

    def __init__(self, engine: Engine, packer: Engine, task: str, number: int, items: int | None, folder: Path) -> None:
        self._engine, self._packer, self._task, self._draw = engine, packer, task, number
        text = encode_corpus(engine, corpus(task, "calibration"))
        self._text = draw(text, number) if number else text
        self._test = encode_corpus(engine, corpus(task, "test", items))
        self._path = folder / f"{task}-{number}-{len(self._test)}.jsonl"
        self._known: dict[tuple[str, str, float], dict[str, Any]] = {}
        for line in self._path.read_text().splitlines() if self._path.exists() else ():
            row = json.loads(line)
            self._known[row["way"], row["stand_in"], row["keep"]] = row
        self._statistics: Statistics | None = None
        self._whole: float | None = None

    def rows(self, keeps: Sequence[float], ways: Sequence[str]) -> Iterator[PackRow]:
        for keep in keeps:
            for stand_in, scorer in product((*KINDS, *CLUSTERS), SCORERS):
                with suppress(BudgetError):  # where what stands in leaves no room for one token's experts
                    yield self._row(scorer, stand_in, keep, ways)
            for way in ways:
                yield self._row(way, PACK, keep, ways)
                if way in CHANNEL_SCORERS:
                    yield self._row(way + OWN, PACK, keep, ways)
                    for strips in STRIPS:
                        with suppress(BudgetError):
                            yield self._row(way + strips, PACK, keep, ways)
            for experts, channels in BOTH.get(keep, ()):
                yield self._row(f"camera, experts {experts:g} x channels {channels:g}", PACK, keep, ways)

    def _row(self, way: str, stand_in: str, keep: float, ways: Sequence[str]) -> PackRow:
        if (way, stand_in, keep) not in self._known:
            if self._whole is None:
                self._whole = self._accuracy(self._measure(self._engine, None))
            measured = self._measured(way, stand_in, keep, ways)
            row = PackRow(
                way, stand_in, self._task, keep, self._draw, measured.items, self._accuracy(measured), self._whole,
                measured.nll, measured.coverage,
            )  # fmt: skip
            self._known[way, stand_in, keep] = asdict(row)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        return PackRow(**self._known[way, stand_in, keep])

    def _measured(self, way: str, stand_in: str, keep: float, ways: Sequence[str]) -> Measured:
        if stand_in in CLUSTERS:
            return self._written(self._clustered(way, CLUSTERS[stand_in], keep, ways))
        if stand_in != PACK:
            return self._selected(way, stand_in, keep, ways)
        if way.endswith(OWN):
            return self._written(self._own_widths(way.removesuffix(OWN), keep, ways))
        for ending, strips in STRIPS.items():
            if way.endswith(ending):
                recipe = self._own_strips(way.removesuffix(ending), strips, keep, ways)
                return self._written(recipe, recipe.selection)
        return self._written(self._packed(way, keep, ways))

    def _clustered(self, scorer: str, share: float, keep: float, ways: Sequence[str]) -> Recipe:
        """Merged experts are paid for like others: so many fewer stay."""
        statistics, slot = self._gathered(ways), self._engine.plan.slot_bytes
        count, layers = kept(statistics.experts, keep, statistics.top_k), statistics.layers
        merged = max(1, round(share * count))
        scores = choose_scorers([scorer])[0].score(statistics)
        left = (count - merged) * layers * slot
        selection = allocate(ALLOCATOR, scores, left, statistics.top_k, [slot] * layers, statistics)
        outputs = sampled_outputs(self._engine, self._text, ROWS)
        width = self._engine.layers.channels.width
        return ClusterStandIns(selection, merged, outputs, statistics.total("selected"), width)

    def _own_widths(self, way: str, keep: float, ways: Sequence[str]) -> Recipe:
        """As many channels as the share says to the last one: no width has to be a multiple of anything."""
        scores = CHANNEL_SCORERS[way].score(self._gathered(ways))
        return OwnWidths(scores, keep, way in ACROSS)

    def _own_strips(self, way: str, strips: int, keep: float, ways: Sequence[str]) -> OwnStrips:
        statistics = self._gathered(ways)
        return OwnStrips(CHANNEL_SCORERS[way].score(statistics), keep, way in ACROSS, strips, statistics.top_k)

    def _selected(self, scorer: str, stand_in: str, keep: float, ways: Sequence[str]) -> Measured:
        statistics, sizes = self._gathered(ways), [self._engine.plan.slot_bytes] * self._engine.card.layers
        scores = choose_scorers([scorer])[0].score(statistics)
        left, vectors = pay(stand_in, keep, statistics, sizes, f"{self._task}-{self._draw}")
        selection = allocate(ALLOCATOR, scores, left, statistics.top_k, sizes, statistics)
        return self._measure(self._engine, replace(selection, stand_in=vectors))

    def _packed(self, way: str, keep: float, ways: Sequence[str]) -> Recipe:
        name, _, shares = way.partition(", experts ")
        if shares:
            experts, channels = map(float, shares.split(" x channels "))
            pack = Pack(name, channels=channels, experts=experts)
        else:
            pack = pack_of(name, keep)
        return make_recipe(self._engine, self._gathered(ways), pack, self._text, ROWS)

    def _written(self, recipe: Recipe, selection: Selection | None = None) -> Measured:
        with tempfile.TemporaryDirectory(prefix="moepager-pack-") as beside:
            write_pack(self._packer, recipe, Path(beside) / "pack", lambda _: {})
            with _open(Path(beside) / "pack", DTYPE) as packed:
                return self._measure(packed, selection)

    def _measure(self, engine: Engine, selection: Selection | None) -> Measured:
        return evaluate_forced(engine, self._test, selection, ROWS, judged_role(self._test))

    def _accuracy(self, measured: Measured) -> float:
        return measured.accuracy or 0.0

    def _gathered(self, ways: Sequence[str]) -> Statistics:
        """All that the ways, scorers and stand-ins read, in one pass (and one of gradients)."""
        if self._statistics is None:
            needs: Needs = needs_of(KINDS)
            needs |= frozenset().union(NOTHING, *(Pack(way).needs for way in (*ways, "camera")))
            needs |= frozenset().union(*(scorer.needs for scorer in choose_scorers(SCORERS)))
            with tempfile.TemporaryDirectory(prefix="moepager-packs-") as runs:
                found = gather_statistics(self._engine, self._text, Run(Path(runs), "p", ""), "", ROWS, ignore, needs)
            extras = of_weights(self._engine, needs)
            extras |= gradients.means(self._engine, self._text, ROWS, needs)
            self._statistics = found.with_extras(extras)
        return self._statistics


def pack_means(rows: Sequence[PackRow]) -> list[PackMean]:
    """The largest size first, at each the best first."""
    groups: dict[tuple[float, str, str], list[PackRow]] = {}
    for row in rows:
        groups.setdefault((row.keep, row.stand_in, row.way), []).append(row)
    found = [
        PackMean(
            way,
            stand_in,
            keep,
            fmean(row.accuracy for row in group),
            fmean(row.accuracy / row.whole if row.whole else 0.0 for row in group),
            fmean(row.nll for row in group),
            len(group),
        )
        for (keep, stand_in, way), group in groups.items()
    ]
    return sorted(found, key=lambda mean: (-mean.keep, -mean.accuracy, mean.nll, mean.way))


PACK_WAYS = tuple(way for way in WAYS if way != "experts")  # which is `nothing` with the allocator uniform
