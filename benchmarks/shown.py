"""What a measurement's command shows: figures or a table for people, or one JSON object on the last line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


def answer(figures: dict[str, Any], as_json: bool) -> None:
    from benchmarks.machine import machine  # noqa: PLC0415 - it asks torch, which takes seconds to import

    whole = figures | {"machine": machine()}
    if as_json:
        typer.echo(json.dumps(whole))
        return
    for name, value in whole.items():
        if not isinstance(value, list | tuple):
            typer.echo(f"{name:>22}  {_shown(value)}")


def table(title: str, rows: Sequence[dict[str, Any]]) -> None:
    shown = Table(title=title)
    for column in rows[0]:
        shown.add_column(column)
    for row in rows:
        shown.add_row(*_cells(row.values()))
    Console(stderr=True, width=140).print(shown)


def _cells(values: Iterable[object]) -> list[str]:
    return [_shown(value) for value in values]


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
