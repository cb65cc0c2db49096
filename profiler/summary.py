"""What a finished profile says: as one JSON object, and as tables for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console, JustifyMethod
from rich.table import Table

from profiler.scorers.registry import computable
from profiler.search import reasons_of
from profiler.stability import split_half_overlap
from profiler.statistics import Statistics
from store.database import Store
from store.intervals import wilson
from store.records import Evaluation, Profile, StoredSelection
from store.sizes import show_bytes

LEFT = frozenset({"scorer", "allocator", "calls", "items of"})


def summary(store: Store, made: Profile) -> dict[str, Any]:
    statistics = Statistics.from_arrays(made.statistics)
    return {
        "profile_id": made.id,
        "task": made.task,
        "model": made.model,
        "tokens": made.tokens,
        "statistics": [{"name": name, "shape": list(array.shape)} for name, array in statistics.arrays.items()],
        "stability": {one.name: split_half_overlap(statistics, one, 0.5) for one in computable(statistics)},
        "trust": None if made.trust is None else made.trust.figures,
        "doubts": list(made.doubts),
        "search": reasons_of(store, made.id),
        "evaluations": [_evaluation(*pair) for pair in store.evaluations.list(made.id)],
        "prices": [asdict(price) for price in store.prices.list(made.id)],
    }


WIDTH = 110  # columns that the widest table needs


def show(found: dict[str, Any]) -> None:
    console = Console()
    if console.width < WIDTH and not console.is_terminal:  # into a file nothing has to be cut off
        console = Console(width=WIDTH)
    console.print(_evaluations(found))
    if found["prices"]:
        console.print(_prices(found))
    if trust := found["trust"]:
        console.print(
            f"{trust['tokens_per_expert']:.0f} tokens an expert, {trust['unseen']:.1%} of the experts never "
            f"used, routing {trust['skew']:.1f} times as uneven as chance{_surprise(trust['surprise'])}"
        )
    for line in (*found["search"], *found["doubts"]):
        console.print(line, markup=False, highlight=False)


def _surprise(nats: float | None) -> str:
    return "" if nats is None else f", the text {nats:+.1f} nats a token against even odds"


def _evaluation(stored: StoredSelection, evidence: Evaluation) -> dict[str, Any]:
    return {
        "selection": stored.id,
        "scorer": stored.scorer,
        "allocator": stored.allocator,
        "stand_in": stored.stand_in,
        "active": stored.active,
        "calls": stored.selection.calls,
        "calls_by": stored.calls_by,
        "keep": stored.keep,
        "experts": len(stored.selection),
        "accuracy": evidence.accuracy,
        "accuracy_95": None if evidence.accuracy is None else wilson(evidence.accuracy, evidence.items),
        "retention": evidence.retention,
        "nll": evidence.nll,
        "coverage": evidence.coverage,
        "items": evidence.items,
    }


def _evaluations(found: dict[str, Any]) -> Table:
    title = f"{found['task']}: profile {found['profile_id']}, {found['tokens']} tokens, {found['seconds']:.1f} s"
    columns = ("keep", "calls", "experts", "accuracy", "95%", "retention", "nll", "coverage")
    table = _table(title, "scorer", "allocator", *columns)
    for row in found["evaluations"]:
        low, high = row["accuracy_95"] or (None, None)
        table.add_row(
            row["scorer"],
            row["allocator"],
            f"{row['keep']:g}",
            _calls(row),
            str(row["experts"]),
            _percent(row["accuracy"]),
            _range(low, high),
            _percent(row["retention"]),
            f"{row['nll']:.3f}",
            _percent(row["coverage"]),
        )
    return table


def _prices(found: dict[str, Any]) -> Table:
    of = {row["selection"]: row for row in found["evaluations"]}
    columns = ("keep", "calls", "bytes", "items of", "accuracy", "95%", "draws")
    table = _table("what each size costs", "scorer", "allocator", *columns)
    for price in found["prices"]:
        row = of[price["selection"]]
        table.add_row(
            row["scorer"],
            row["allocator"],
            f"{row['keep']:g}",
            _calls(row),
            show_bytes(price["bytes"]),
            {"own": "the task", "others": "other tasks"}[price["text"]],
            _percent(price["accuracy"]),
            _range(price["low"], price["high"]),
            " ".join(_percent(accuracy) for accuracy, _ in price["draws"]) or "-",
        )
    return table


def _calls(row: dict[str, Any]) -> str:
    """The share of a token's calls of experts that is made, and by which rule."""
    return "all" if row["calls"] is None else f"{row['active']:g} {row['calls_by']}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, padding=(0, 0), collapse_padding=True)
    for column in columns:
        # Where a terminal is narrow, words are folded, so that no figure is cut.
        left, folds = column in LEFT, column in LEFT or column == "draws"
        justify: JustifyMethod = "left" if left else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not folds, min_width=6 if folds else None)
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _range(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"{low:.0%}-{high:.0%}"
