"""Every scorer and allocator at every size on the demo's held-out test items: what accuracy a memory budget keeps.

The test items are in phrasings that neither training nor calibration has seen, with held-out content where content can
be held out, and they are not the items by which the service, or the automatic choice here, chooses a selection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from benchmarks.quality_grid import Grid, Row
from benchmarks.quality_runs import Runs
from demo.prepare import DTYPE, THREADS, corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import UNIFORM, needs_of_allocators, select
from profiler.allocators import PLAIN
from profiler.batches import Encoded, encode_corpus
from profiler.bred import room_for, spread
from profiler.calls import RULES, Errors, budget_of, measure_errors, with_calls
from profiler.channels.weights import of_weights
from profiler.draws import draw
from profiler.evaluate import Measured, judged_role
from profiler.evolution import ALLOCATOR, NAME, evolve, start_above
from profiler.forced import evaluate_forced
from profiler.gather import gather_statistics
from profiler.progress import Progress, Report, ignore
from profiler.router_rows import of_router
from profiler.run import Run
from profiler.scorers.registry import BASELINES, SCORERS, choose, needs_of
from profiler.search import contest
from profiler.second_looks import second_looks
from profiler.stand_ins import needs_of as needs_of_stand_ins
from profiler.stand_ins import pay
from profiler.statistics import Statistics
from store.home import bundled_model
from store.records import Selection, StoredSelection
from store.stand_ins import NOTHING

AUTOMATIC = "automatic"  # what `moepager profile --search` would choose on the evaluation split
FEW_SHOT_ALLOCATOR = "coverage"
ROWS = 50


@dataclass(frozen=True, slots=True)
class _Text:
    draw: int
    shots: int | None
    items: Sequence[Encoded]

    @property
    def name(self) -> str:
        return f"draw{self.draw}" if self.shots is None else f"draw{self.draw}of{self.shots}"


def bench_quality(grid: Grid, report: Report, folder: Path | None = None) -> list[Row]:
    """All rows of the grid. What `folder` holds of it already is not measured again; without one nothing is kept."""
    config = EngineConfig(bundled_model(), max_context=256, max_batch=ROWS, dtype=DTYPE, threads=THREADS, stand_ins=1)
    rows: list[Row] = []
    errors = None
    with tempfile.TemporaryDirectory(prefix="moepager-quality-") as beside, Engine.open(config) as engine:
        if grid.active:
            for share in grid.active:
                budget_of(share, engine.card.layers, engine.card.top_k)
            errors = measure_errors(engine)
        for task in grid.tasks:
            bench = _Bench(engine, grid, task, Runs(folder or Path(beside), engine.card.fingerprint, task), errors)
            for text in bench.texts():
                report(Progress(f"{task}, {text.name}", "evaluate", len(rows), len(rows)))
                rows += bench.rows(text)
    return rows


class _Bench:
    """One task."""

    def __init__(self, engine: Engine, grid: Grid, task: str, runs: Runs, errors: Errors | None = None) -> None:
        self.engine, self.grid, self.task, self.runs, self.errors = engine, grid, task, runs, errors
        self._calibration = encode_corpus(engine, corpus(task, "calibration"))
        self._test = _in_order(encode_corpus(engine, corpus(task, "test", grid.items)))
        self._evaluation = _in_order(encode_corpus(engine, corpus(task, "evaluation")))

    def texts(self) -> Iterator[_Text]:
        for number in range(self.grid.draws + 1):
            yield _Text(number, None, draw(self._calibration, number) if number else self._calibration)
        for shots, number in product(self.grid.few_shot, range(1, self.grid.draws + 1)):
            yield _Text(number, shots, draw(self._calibration, number, shots))

    def rows(self, text: _Text) -> list[Row]:
        few = text.shots is not None
        scorers = [one for one in self.grid.scorers if not (few and choose([one])[0].needs)]
        allocators = (FEW_SHOT_ALLOCATOR,) if few else self.grid.allocators
        kinds = (NOTHING,) if few else self.grid.stand_ins
        candidates = self._candidates(text, scorers, allocators, self.grid.keeps, kinds)
        measured = list(candidates) if few else [*candidates, *self._with_fewer_calls(candidates)]
        if self.grid.evolve and not few:
            measured += self._bred(text, candidates)
        if self.grid.automatic and not few:
            chosen = list(self._chosen(text))
            measured += [*chosen, *self._with_fewer_calls(chosen)]
        return [self._row(text, one, self._measure(self._test, one.selection)) for one in measured]

    def _with_fewer_calls(self, candidates: Sequence[StoredSelection]) -> Iterator[StoredSelection]:
        """What `profile --active` would make of them."""
        if self.errors is not None:
            for one, share, rule in product(candidates, self.grid.active, RULES):
                yield with_calls(self.errors, one, share, rule)

    def _candidates(
        self,
        text: _Text,
        scorers: Sequence[str],
        allocators: Sequence[str],
        keeps: Sequence[float],
        kinds: Sequence[str] = (NOTHING,),
    ) -> list[StoredSelection]:
        """At equal bytes, whatever stands in for the experts left out; all experts need nothing."""
        wanted = choose(scorers)
        statistics = self._statistics(
            text, needs_of(wanted) | needs_of_allocators(allocators) | needs_of_stand_ins(kinds)
        )
        sizes = [self.engine.plan.slot_bytes] * statistics.layers
        found = []
        for scorer, allocator, keep, kind in product(wanted, allocators, keeps, kinds):
            if kind != NOTHING and keep == 1:
                continue
            budget, stand_in = pay(kind, float(keep), statistics, sizes, f"{self.task}-{text.name}")
            kept = replace(select(scorer, allocator, statistics, budget, sizes), stand_in=stand_in)
            found.append(StoredSelection("", "", scorer.name, allocator, keep, kept, kind))
        return found

    def _bred(self, text: _Text, candidates: Sequence[StoredSelection]) -> Iterator[StoredSelection]:
        """What `profile --evolve` breeds on calibration items of what the grid's scorers chose, smallest size first."""
        judged = spread(text.items)

        def fitness(selection: Selection) -> Measured:
            return self.runs.measured(
                judged, selection, lambda part: evaluate_forced(self.engine, part, selection, ROWS)
            )

        smaller: Selection | None = None
        for keep in sorted(keep for keep in self.grid.keeps if keep < 1):
            here = [one for one in candidates if one.keep == keep and one.stand_in == NOTHING]
            start = [one.selection for one in here if one.scorer not in BASELINES]
            if not start:
                return
            start = start if smaller is None else start_above(smaller, start)
            smaller = evolve(start, room_for(self.engine, start), self.grid.evolve, fitness)
            yield StoredSelection("", "", NAME, ALLOCATOR, keep, smaller)

    def _chosen(self, text: _Text) -> Iterator[StoredSelection]:
        """What the search finds at each size on the evaluation split, by the scorers and allocators it tries."""
        plain = [one.name for one in SCORERS.values() if not one.needs and one.name not in BASELINES]
        for keep in self.grid.keeps:
            candidates = self._candidates(text, plain, PLAIN, [keep])
            candidates += self._candidates(text, BASELINES, [UNIFORM], [keep])
            ranking = contest(candidates, self._evaluation, lambda kept, part: self._measure(part, kept)).ranking
            best = next(stored for stored, _ in ranking if stored.scorer not in BASELINES)
            yield StoredSelection("", "", AUTOMATIC, "searched", keep, best.selection)

    def _statistics(self, text: _Text, needs: frozenset[str]) -> Statistics:
        name = "-".join([text.name, *sorted(needs)])

        def make() -> Statistics:
            with tempfile.TemporaryDirectory(prefix="moepager-quality-") as folder:
                run = Run(Path(folder), "pass", plan="")
                found = gather_statistics(self.engine, text.items, run, self.task, ROWS, ignore, needs)
            looks = second_looks(self.engine, text.items, ROWS, needs)
            static = of_router(self.engine.checkpoint, needs, None) | of_weights(self.engine, needs)
            return found.with_extras(static | looks)

        return self.runs.statistics(name, make)

    def _measure(self, items: Sequence[Encoded], selection: Selection | None) -> Measured:
        whole = Selection.whole(self.engine.card.layers, self.engine.card.experts)
        kept = None if selection == whole else selection
        role = judged_role(items)
        return self.runs.measured(items, kept, lambda part: evaluate_forced(self.engine, part, kept, ROWS, role))

    def _row(self, text: _Text, one: StoredSelection, measured: Measured) -> Row:
        whole = self._measure(self._test, None)
        return Row(
            scorer=one.scorer,
            allocator=one.allocator,
            task=self.task,
            keep=one.keep,
            draw=text.draw,
            shots=text.shots,
            accuracy=measured.accuracy or 0.0,
            retention=(measured.accuracy or 0.0) / (whole.accuracy or 1.0),
            nll=measured.nll,
            coverage=measured.coverage,
            items=measured.items,
            stand_in=one.stand_in,
            active=one.active,
            calls_by=one.calls_by,
        )


def _in_order(text: Sequence[Encoded]) -> list[Encoded]:
    return sorted(text, key=lambda one: one.number)
