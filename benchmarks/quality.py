"""Every scorer and allocator at every size on the demo's held-out test items: what accuracy a memory budget keeps.

The test items are in phrasings that neither training nor calibration has seen, with held-out content where content can
be held out, and they are not the items by which the service chooses a selection.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from demo.prepare import prepare
from engine.embedder import open_embedder
from profiler.allocation import UNIFORM
from profiler.progress import Report
from profiler.scorers.registry import DEFAULTS
from store.database import Store, open_store
from store.home import bundled_model


@dataclass(frozen=True, slots=True)
class Row:
    scorer: str
    allocator: str
    task: str
    keep: float
    accuracy: float
    retention: float
    nll: float
    coverage: float
    items: int


@dataclass(frozen=True, slots=True)
class Mean:
    """A scorer and allocator at a size, averaged over the tasks. `worst` is the lowest retention of a task."""

    scorer: str
    allocator: str
    keep: float
    accuracy: float
    retention: float
    worst: float
    nll: float
    coverage: float

    @property
    def way(self) -> str:
        return self.scorer if self.allocator == UNIFORM else f"{self.scorer}, {self.allocator}"


def bench_quality(
    items: int | None, scorers: Sequence[str] | None, report: Report, allocators: Sequence[str] = (UNIFORM,)
) -> list[Row]:
    """Profiles the demo's tasks into a store of its own and reads the evidence back."""
    with (
        tempfile.TemporaryDirectory(prefix="moepager-quality-") as folder,
        open_store(f"sqlite:///{folder}/store.db") as store,
    ):
        profiles = prepare(
            store,
            open_embedder("hash"),  # retrieval takes no part in this
            bundled_model(),
            scorers=scorers or list(DEFAULTS),
            allocators=allocators,
            split="test",
            items=items,
            generalist=False,
            runs=Path(folder) / "runs",
            report=report,
        )
        return [row for profile in profiles for row in _rows(store, profile.task, profile.id)]


def _rows(store: Store, task: str, profile: str) -> list[Row]:
    return [
        Row(
            scorer=stored.scorer,
            allocator=stored.allocator,
            task=task,
            keep=stored.keep,
            accuracy=evidence.accuracy or 0.0,
            retention=evidence.retention or 0.0,
            nll=evidence.nll,
            coverage=evidence.coverage,
            items=evidence.items,
        )
        for stored, evidence in store.evaluations.list(profile)
    ]


def means(rows: Sequence[Row]) -> list[Mean]:
    """Over tasks, best first at each size, the largest size first."""
    groups: dict[tuple[float, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.keep, row.scorer, row.allocator), []).append(row)
    found = [
        Mean(
            scorer=scorer,
            allocator=allocator,
            keep=keep,
            accuracy=fmean(row.accuracy for row in group),
            retention=fmean(row.retention for row in group),
            worst=min(row.retention for row in group),
            nll=fmean(row.nll for row in group),
            coverage=fmean(row.coverage for row in group),
        )
        for (keep, scorer, allocator), group in groups.items()
    ]
    return sorted(found, key=lambda mean: (-mean.keep, -mean.accuracy, mean.nll, mean.way))
