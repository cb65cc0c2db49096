"""Rows of `bench quality` averaged over tasks and draws, and how sure the averages are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from benchmarks.quality_grid import Row
from profiler.allocation import UNIFORM
from store.stand_ins import NOTHING


@dataclass(frozen=True, slots=True)
class Mean:
    """A scorer and allocator at a size, averaged over tasks and draws. `worst` is the lowest retention of a task.

    `spread` is the standard deviation between draws of the mean over tasks, None for one draw; `sure` half the width
    of a 95% interval of `accuracy`, over items alone (the tasks are what they are, not a sample).
    """

    scorer: str
    allocator: str
    keep: float
    shots: int | None
    draws: int
    accuracy: float
    retention: float
    worst: float
    spread: float | None
    sure: float
    nll: float
    coverage: float
    stand_in: str = NOTHING
    active: float = 1.0
    calls_by: str = "all"

    @property
    def way(self) -> str:
        parts = [self.scorer, *([self.allocator] if self.allocator != UNIFORM else [])]
        parts += [self.stand_in] if self.stand_in != NOTHING else []
        return ", ".join([*parts, *([f"{self.active:g} {self.calls_by}"] if self.active < 1 else [])])


def means(rows: Sequence[Row]) -> list[Mean]:
    """Best first at each size, the largest size first. Where there are draws, the text as it is takes no part."""
    drawn = any(row.draw for row in rows)
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if bool(row.draw) == drawn:
            way = row.keep, row.scorer, row.allocator, row.stand_in, row.active, row.calls_by, row.shots
            groups.setdefault(way, []).append(row)
    found = [_mean(group) for group in groups.values()]
    return sorted(found, key=lambda mean: (mean.shots or 0, -mean.keep, -mean.accuracy, mean.nll, mean.way))


def _mean(group: Sequence[Row]) -> Mean:
    draws = sorted({row.draw for row in group})
    tasks = sorted({row.task for row in group})
    by_draw = [fmean(row.accuracy for row in group if row.draw == draw) for draw in draws]
    by_task = [fmean(row.retention for row in group if row.task == task) for task in tasks]
    first = group[0]
    return Mean(
        scorer=first.scorer,
        allocator=first.allocator,
        keep=first.keep,
        shots=first.shots,
        draws=len(draws),
        accuracy=fmean(row.accuracy for row in group),
        retention=fmean(row.retention for row in group),
        worst=min(by_task),
        spread=stdev(by_draw) if len(by_draw) > 1 else None,
        sure=_half_width([row for row in group if row.draw == draws[0]]),
        nll=fmean(row.nll for row in group),
        coverage=fmean(row.coverage for row in group),
        stand_in=first.stand_in,
        active=first.active,
        calls_by=first.calls_by,
    )


def _half_width(rows: Sequence[Row]) -> float:
    """Of the mean over tasks of one draw: the same items serve all draws, so draws add no items."""
    variance = sum(row.accuracy * (1 - row.accuracy) / row.items for row in rows)
    return 1.96 * math.sqrt(variance) / len(rows)
