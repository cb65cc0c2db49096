"""The report as one HTML page: no script, nothing from elsewhere. Jinja escapes every word that the store gives."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version

from jinja2 import Environment, PackageLoader, StrictUndefined

from profiler.report.gathered import ModelReport
from profiler.report.plots import accuracy_curves, heat_map, memory_of, overlap_map, stability_dots
from store.sizes import show_bytes


def render(report: ModelReport, expert_bytes: int, store: str) -> str:
    """`expert_bytes` of one expert in memory; `store` is the database's name without its password."""
    room = Environment(
        loader=PackageLoader("profiler.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    room.filters |= {"percent": _percent, "size": show_bytes}
    return room.get_template("page.html").render(
        report=report,
        store=store,
        made=datetime.now(UTC),
        version=version("moepager"),
        overlap=overlap_map(report) if len(report.tasks) > 1 else None,
        shares=report.overlap().tolist(),
        stability=stability_dots(report) if any(one.agreement for one in report.tasks) else None,
        heat={one.task: heat_map(one) for one in report.tasks},
        curves={one.task: accuracy_curves(one, expert_bytes) for one in report.tasks if one.measured},
        memory=lambda one: memory_of(one, expert_bytes),
    )


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}%"
