"""The accuracy-against-memory picture of `bench quality`. The only file of this room that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality_grid import Row
from benchmarks.quality_means import Mean
from demo.commands import memory_for
from store.home import bundled_model
from store.stand_ins import NOTHING

BASELINES = {"random": "#aaaaaa", "frequency": "#444444"}


def plot_quality(rows: Sequence[Row], means: Sequence[Mean], out: Path) -> None:
    """The text as it is and its draws; memory is what the bundled model's service needs at each size."""
    budgets = {keep: memory_for(bundled_model(), keep) / 2**20 for keep in {row.keep for row in rows}}
    draw([row for row in rows if row.shots is None], [mean for mean in means if mean.shots is None], budgets, out)


def draw(rows: Sequence[Row], means: Sequence[Mean], mib_at: dict[float, float], out: Path) -> None:
    """One panel an allocator with every scorer's mean over the tasks; the last shows each task by the scorer and
    allocator that are best on average at the smallest size."""
    means = [mean for mean in means if mean.stand_in == NOTHING and mean.active == 1]
    rows = [row for row in rows if row.stand_in == NOTHING and row.active == 1]
    allocators = sorted({mean.allocator for mean in means}, reverse=True)
    scorers = sorted({mean.scorer for mean in means})
    figure, panels = plt.subplots(1, len(allocators) + 1, figsize=(5 * len(allocators) + 5, 4.4), sharey=True)
    for axes, allocator in zip(panels, allocators, strict=False):
        for place, scorer in enumerate(scorers):
            here = [mean for mean in means if (mean.scorer, mean.allocator) == (scorer, allocator)]
            style = {"color": BASELINES.get(scorer, f"C{place}"), "linestyle": "--" if scorer in BASELINES else "-"}
            axes.plot(*_points(here, mib_at), marker="o", label=scorer, **style)
        _finish(axes, f"mean over the tasks, {allocator}", mib_at)
    smallest = min(mean.keep for mean in means)
    best = max((mean for mean in means if mean.keep == smallest), key=lambda mean: (mean.accuracy, -mean.nll))
    for task in sorted({row.task for row in rows}):
        chosen = (task, best.scorer, best.allocator)
        panels[-1].plot(
            *_points([r for r in rows if (r.task, r.scorer, r.allocator) == chosen], mib_at), ".-", label=task
        )
    _finish(panels[-1], f"each task by {best.scorer}, {best.allocator}", mib_at)
    panels[0].set_ylabel("exact-match accuracy on held-out items")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _points(rows: Sequence[Row | Mean], mib_at: dict[float, float]) -> tuple[list[float], list[float]]:
    """Budgets and accuracies, the smallest budget first."""
    ordered = sorted(rows, key=lambda row: row.keep)
    return [mib_at[row.keep] for row in ordered], [row.accuracy for row in ordered]


def _finish(axes: Axes, title: str, mib_at: dict[float, float]) -> None:
    axes.set_title(title)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("memory budget in MiB, and share of the experts")
    ticks = sorted(mib_at.items())
    axes.set_xticks([mib for _, mib in ticks], [f"{mib:.0f}\n{keep:.3g}" for keep, mib in ticks], fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
