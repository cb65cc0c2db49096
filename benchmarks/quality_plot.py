"""The accuracy-against-memory picture of `bench quality`. The only file that imports matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.quality import Mean, Row

BASELINES = {"random": "#999999", "frequency": "#555555"}


def draw(rows: Sequence[Row], means: Sequence[Mean], mib_at: dict[float, float], out: Path) -> None:
    """Left: every scorer's mean over tasks. Right: each task, by the scorer that is best on average at the smallest."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for way in sorted({mean.way for mean in means}):
        points = sorted((mib_at[mean.keep], mean.accuracy) for mean in means if mean.way == way)
        colour = BASELINES.get(way)
        left.plot(*zip(*points, strict=True), marker="o", label=way, color=colour, linestyle="--" if colour else "-")
    best = max(
        (mean for mean in means if mean.keep == min(m.keep for m in means)), key=lambda mean: (mean.accuracy, -mean.nll)
    )
    for task in sorted({row.task for row in rows}):
        here = [row for row in rows if (row.task, row.scorer, row.allocator) == (task, best.scorer, best.allocator)]
        points = sorted((mib_at[row.keep], row.accuracy) for row in here)
        right.plot(*zip(*points, strict=True), marker=".", label=task)
    _finish(left, "mean over the tasks, by scorer", mib_at)
    _finish(right, f"each task, scorer {best.way}", mib_at)
    left.set_ylabel("exact-match accuracy on held-out items")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def _finish(axes: Axes, title: str, mib_at: dict[float, float]) -> None:
    axes.set_title(title)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("memory budget, MiB (share of the experts)")
    ticks = sorted(mib_at.items())
    axes.set_xticks([mib for _, mib in ticks], [f"{mib:.0f}\n({keep:g})" for keep, mib in ticks])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
