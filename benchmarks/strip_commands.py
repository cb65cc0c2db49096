"""`moepager bench strips` and `bench strip-speed`: what strips keep, and what they cost in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.shown import AsJson, answer, table
from store.quantisation import Way

if TYPE_CHECKING:
    from benchmarks.strip_speed import SpeedRow


def strips_command(
    strips: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable; 1 (whole experts), 4 and 12 if none.")
    ] = None,
    quantised: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable: packs that are measured in MXFP4, too; 1 if none.")
    ] = None,
    keep: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable, shares of the model's bytes; 0.25, 0.125, 0.0625 and 0.03125 if none."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Test items a task, at most 100.")] = 40,
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; all of the demo's tasks if none.")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="Repeatable, of the search; five, of which camera is one, if none.")
    ] = None,
    allocator: Annotated[
        list[str] | None, typer.Option(help="Repeatable, of the search; coverage and global if none.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder that keeps packs, profiles and figures: a killed run goes on from it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Experts whole, in strips and in four bits at equal bytes, chosen by `profile --search`, on the demo's tests."""
    from benchmarks.strips import Wish, bench_strips, strip_means
    from profiler.bar import bar

    given: dict[str, Any] = {
        "strips": strips,
        "quantised": quantised,
        "keeps": keep,
        "tasks": task,
        "scorers": scorer,
        "allocators": allocator,
    }
    wish = Wish(items=items, **{name: tuple(dict.fromkeys(value)) for name, value in given.items() if value})
    with bar() as report:
        rows = bench_strips(wish, report, checkpoint)
    means = [asdict(mean) for mean in strip_means(rows)]
    table("mean over the tasks", means)
    if as_json:
        answer({"rows": [asdict(row) for row in rows], "means": means}, as_json)


def strip_speed_command(
    model: Annotated[Path, typer.Option(help="Model folder, such as one of `bench make-model`.")],
    strips: Annotated[
        list[int] | None, typer.Option(min=2, help="Repeatable, beside whole experts; 2, 4 and 8 if none of both.")
    ] = None,
    quantised: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Repeatable: numbers of strips that are timed quantised, too, such as 1; none if none."
        ),
    ] = None,
    way: Annotated[list[Way] | None, typer.Option(help="Repeatable: how those are quantised; mxfp4 if none.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in a selection, at most a third.")] = 0.25,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="In each, every arm has its turn.")] = 7,
    packs: Annotated[Path | None, typer.Option(help="A folder that keeps the packs; each takes what M takes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Decoding and cold paging of experts in strips, and quantised, beside whole ones. Random weights will do."""
    from benchmarks.strip_speed import Terms, bench_strip_speed

    counts = (1, *dict.fromkeys(strips or (() if quantised else (2, 4, 8))))
    rows, load = bench_strip_speed(
        Terms(
            model,
            counts,
            keep,
            tokens,
            rounds,
            threads,
            tuple(dict.fromkeys(quantised or ())),
            tuple(each.value for each in dict.fromkeys(way or (Way.MXFP4,))),
        ),
        packs,
    )
    for clock, ending in (("the clock", ""), ("the processor's time", "_cpu")):
        names = [f"one_row{ending}", f"eight_rows{ending}", f"paging{ending}_s"]
        table(
            f"tokens/s and seconds by {clock}: median, ratio to whole experts (range)",
            [_flat(row, names) for row in rows],
        )
    answer({"rows": [asdict(row) for row in rows], "load_before": load[0], "load_after": load[1]}, as_json)


def _flat(row: SpeedRow, names: Sequence[str]) -> dict[str, Any]:
    figures = asdict(row)
    plain = {name: value for name, value in figures.items() if not isinstance(value, dict)}
    return plain | {
        name: "{median:.3g}, {ratio:.2f} ({low:.2f} to {high:.2f})".format(**figures[name]) for name in names
    }
