"""The report's pictures as SVG text, to stand inside a page. The only file of this room that imports matplotlib.

Lines and letters that are black in a plain picture take the page's own colour, so they are seen on light and dark; the
colours of data are of middle brightness. Text stays text. L MoE layers, E experts a layer.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import count
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from profiler.report.gathered import PLAIN, Measured, ModelReport, TaskReport, curves
from profiler.scorers.registry import BASELINES

INK = "#010203"  # nothing else is drawn in it: it becomes the page's colour
COLOURS = (
    "#4d8fd8", "#e08237", "#45a66d", "#cf62a6", "#9a80d4", "#b3932f", "#2fa3b4", "#d9625e", "#7f9c3c", "#a97b5f",
)  # fmt: skip
MARKERS = "osD^vP*X"
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "moepager", "text.parse_math": False, "text.color": INK, "font.size": 9,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10,
    "axes.facecolor": "none", "figure.facecolor": "none", "savefig.facecolor": "none", "legend.framealpha": 0.0,
    "image.interpolation": "none",
}  # fmt: skip
PIXELS = 105  # an inch of a picture on the page, at most
_numbers = count()


def heat_map(report: TaskReport) -> Markup:
    """Layers x experts: the share of the router's weight that each expert carried, each row ordered by id."""
    layers, experts = report.weight.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 0.22 * layers + 0.5), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(100 * report.weight, aspect="auto", cmap="viridis", vmin=0)
        axes.set_xlabel("expert")
        axes.set_ylabel("MoE layer")
        axes.set_yticks(range(0, layers, max(1, layers // 12)))
        figure.colorbar(image, ax=axes, label="% of the layer's weight", shrink=0.9)
    top = np.sort(report.weight, axis=1)[:, ::-1][:, : max(1, experts // 4)].sum(axis=1).mean()
    about = f"Heat map of {layers} layers x {experts} experts for {report.task}: the heaviest quarter of each layer"
    return _svg(figure, f"{about} carries {top:.0%} of the router's weight on average.")


def overlap_map(report: ModelReport) -> Markup:
    """Task x task: what share of the experts of either both choose."""
    shares, names = report.overlap(), [one.task for one in report.tasks]
    size = 2.2 + 0.42 * len(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        axes.set_xticks(range(len(names)), [_short(name) for name in names], rotation=45, ha="right")
        axes.set_yticks(range(len(names)), [_short(name) for name in names])
        for row, column in np.ndindex(shares.shape):
            share = shares[row, column]
            axes.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=7,
                      color="#ffffff" if share < 0.6 else "#000000")  # fmt: skip
        figure.colorbar(image, ax=axes, label="Jaccard index", shrink=0.8)
    return _svg(figure, f"Overlap of the experts that {len(names)} tasks use most; the table below has the numbers.")


def accuracy_curves(report: TaskReport, expert_bytes: int) -> Markup:
    """Accuracy over memory for every scorer, with intervals; loss over memory where a task can't be scored. A panel for
    each way to allocate experts and to stand in for them."""
    measured = [one for one in report.measured if one.selection.active == 1]  # fewer calls save no memory
    scored = [one for one in measured if one.evaluation.accuracy is not None]
    rows = scored or measured
    scorers = sorted({one.selection.scorer for one in rows})
    settings = sorted({one.setting for one in rows}, key=lambda setting: (setting != PLAIN, setting))
    across = min(2, len(settings))
    down = -(-len(settings) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4.2 * across, 0.4 + 2.8 * down), layout="constrained")
        panels = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False).flat
        for setting, axes in zip(settings, panels, strict=False):
            for scorer, line in curves([one for one in rows if one.setting == setting]).items():
                _curve(axes, line, scorers.index(scorer), expert_bytes)
            _finish(axes, setting if len(settings) > 1 else "", bool(scored))
        for axes in list(panels):
            axes.set_axis_off()
        lines = {str(line.get_label()): line for axes in figure.axes for line in axes.get_lines()}
        figure.legend(list(lines.values()), list(lines), fontsize=8, loc="outside right center")
        figure.supxlabel("MiB of experts in memory", fontsize=9)
        figure.supylabel("accuracy on held-out items" if scored else "loss on held-out items, nats a token", fontsize=9)
    return _svg(figure, f"{'Accuracy' if scored else 'Loss'} over memory for {report.task}; the table has the numbers.")


def _curve(axes: Axes, line: Sequence[Measured], place: int, expert_bytes: int) -> None:
    sizes = [memory_of(one, expert_bytes) / 2**20 for one in line]
    values = [one.evaluation.nll if one.evaluation.accuracy is None else one.evaluation.accuracy for one in line]
    scorer, colour = line[0].selection.scorer, COLOURS[place % len(COLOURS)]
    marker = MARKERS[place % len(MARKERS)]  # told apart without colour, too
    axes.plot(
        sizes, values, "--" if scorer in BASELINES else "-", marker=marker, markersize=4, color=colour, label=scorer
    )
    if all(one.low is not None and one.high is not None for one in line):
        low, high = [one.low or 0.0 for one in line], [one.high or 0.0 for one in line]
        axes.fill_between(sizes, low, high, color=colour, alpha=0.10, linewidth=0)


def _finish(axes: Axes, title: str, scored: bool) -> None:
    axes.set_title(title)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    if scored:
        axes.set_ylim(0, 1.02)


def memory_of(one: Measured, expert_bytes: int) -> int:
    """As it was measured, or as many experts as the selection has."""
    return one.bytes if one.bytes is not None else len(one.selection.selection) * expert_bytes


def stability_dots(report: ModelReport) -> Markup:
    """A column a task, a dot a scorer: how much two halves of the text agree on, over what chance gives."""
    names = sorted({name for one in report.tasks for name in one.agreement})
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.0, 2.5 + 0.7 * len(report.tasks)), 3.4), layout="constrained")
        axes = figure.add_subplot()
        for place, name in enumerate(names):
            points = [(column, one.agreement[name]) for column, one in enumerate(report.tasks) if name in one.agreement]
            axes.plot(*zip(*points, strict=True), MARKERS[place % len(MARKERS)], markersize=5, label=name,
                      color=COLOURS[place % len(COLOURS)])  # fmt: skip
        axes.axhline(report.keep, linestyle=":", color=INK, label="chance")
        axes.set_xticks(range(len(report.tasks)), [_short(one.task) for one in report.tasks], rotation=45, ha="right")
        axes.set_ylim(0, 1.02)
        axes.set_ylabel("shared by both halves")
        axes.grid(axis="y", alpha=0.25)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure, "Agreement of two halves of each task's text, by scorer; each task's section has the numbers.")


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _svg(figure: Figure, about: str) -> Markup:
    """The picture with a label for those who can't see it, and names that no other picture on the page has."""
    out = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = out.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    prefix = f"p{next(_numbers)}-"
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    width = round(figure.get_figwidth() * PIXELS)
    text = re.sub(r'<svg\b[^>]*?\bviewBox="([^"]*)"[^>]*>', _opening(about, width), text, count=1)
    return Markup(text)  # noqa: S704 - matplotlib escapes what it is given to write


def _opening(about: str, width: int) -> str:
    label = str(escape(about)).replace("\\", r"\\")
    return (
        r'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" '
        f'class="plot" style="max-width: {width}px" role="img" aria-label="{label}">'
    )
