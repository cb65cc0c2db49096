"""`moepager profile`: options in, one job, a table or one JSON object out."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import InvalidInput

if TYPE_CHECKING:
    from engine.engine import Engine
    from profiler.progress import Progress as Step
    from profiler.progress import Report
    from store.database import Store
    from store.records import Profile

app = typer.Typer()


@app.command()
def profile(
    task: Annotated[str, typer.Option(help="The task's name; `generalist` is the mean of all profiled tasks.")],
    calibration: Annotated[
        Path | None, typer.Option(help='JSONL: {"prompt"}, {"prompt", "response"} or {"messages"} a line.')
    ] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="JSONL of other items: without it no evidence, and no mask mode.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A folder or hub id. Default: the bundled demo model.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="Database URL. Default: the embedded store.")] = None,
    memory: Annotated[str | None, typer.Option(help="Bytes for everything on the device, such as 2GiB.")] = None,
    scorer: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all scorers.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Repeatable share. Default: 1, 0.5, 0.25, 0.125.")] = None,
    embedder: Annotated[str, typer.Option(help="minilm, hash, or a sentence-transformers name or folder.")] = "minilm",
    description: Annotated[str, typer.Option(help="What the task is, for people.")] = "",
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and response together.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items that run at once.")] = 16,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the model's arithmetic.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Score every expert for a task in one pass over its text, and measure what smaller sets of them can do.

    An interrupted run goes on where it stopped when it is started again.
    """
    from profiler.job import GENERALIST

    if (calibration is None) != (task == GENERALIST):
        raise InvalidInput(
            "A task needs --calibration FILE."
            if calibration is None
            else f"--task {GENERALIST} takes no --calibration.",
            param="calibration",
        )
    from engine.config import EngineConfig
    from engine.engine import Engine
    from profiler.evidence import KEEPS
    from profiler.job import Options
    from profiler.scorers.registry import choose
    from store.database import open_store
    from store.hub import model_folder
    from store.sizes import parse_bytes

    choose(scorer)
    options = Options(scorers=scorer, keeps=tuple(keep or KEEPS), rows=batch, model_name=model)
    config = EngineConfig(
        model_folder(model),
        memory=None if memory is None else parse_bytes(memory),
        device=device,
        dtype=dtype,
        max_context=max_context,
        max_batch=batch,
        threads=threads,
    )
    started = time.perf_counter()
    with open_store(store) as opened, Engine.open(config) as engine, _bar() as report:
        files = calibration, evaluation
        made = _run(engine, opened, task, description, files, embedder, options, report)
        found = _summary(opened, made, time.perf_counter() - started)
    _show(found)
    if as_json:
        typer.echo(json.dumps(found))


def _run(
    engine: Engine,
    store: Store,
    task: str,
    description: str,
    files: tuple[Path | None, Path | None],
    embedder: str,
    options: Any,
    report: Report,
) -> Profile:
    from engine.embedder import open_embedder
    from profiler.corpus import read_corpus
    from profiler.generalist import profile_generalist
    from profiler.job import profile_task
    from store.records import TaskRecord

    calibration, evaluation = (None if path is None else read_corpus(path) for path in files)
    for corpus in filter(None, (calibration, evaluation)):
        for found in corpus.duplicates[:5]:
            typer.echo(f"{corpus.source}, line {found.line} repeats line {found.first_line}: left out.", err=True)
        if len(corpus.duplicates) > 5:
            typer.echo(f"{corpus.source}: {len(corpus.duplicates)} repeated lines left out in all.", err=True)
    if calibration is None:
        return profile_generalist(engine, store, evaluation, options=options, report=report)
    record = TaskRecord(task, description)
    chosen = open_embedder(embedder)
    return profile_task(engine, store, record, calibration, evaluation, embedder=chosen, options=options, report=report)


def _summary(store: Store, made: Profile, seconds: float) -> dict[str, Any]:
    from profiler.scorers.registry import SCORERS
    from profiler.stability import split_half_overlap
    from profiler.statistics import Statistics

    statistics = Statistics.from_arrays(made.statistics)
    selections = [
        {
            "selection": stored.id,
            "scorer": stored.scorer,
            "keep": stored.keep,
            "experts": len(stored.selection),
            "accuracy": evidence.accuracy,
            "retention": evidence.retention,
            "nll": evidence.nll,
            "coverage": evidence.coverage,
            "items": evidence.items,
        }
        for stored, evidence in store.evaluations.list(made.id)
    ]
    return {
        "profile_id": made.id,
        "task": made.task,
        "model": made.model,
        "tokens": made.tokens,
        "seconds": round(seconds, 3),
        "statistics": [{"name": name, "shape": list(array.shape)} for name, array in statistics.arrays.items()],
        "stability": {name: split_half_overlap(statistics, scorer, 0.5) for name, scorer in SCORERS.items()},
        "evaluations": selections,
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['task']}: profile {found['profile_id']}, {found['tokens']} tokens, {found['seconds']:.1f} s"
    )
    for column in ("scorer", "keep", "experts", "accuracy", "retention", "nll", "coverage"):
        table.add_column(column, justify="left" if column == "scorer" else "right")
    for row in found["evaluations"]:
        shares = ["-" if row[name] is None else f"{row[name]:.1%}" for name in ("accuracy", "retention")]
        table.add_row(
            row["scorer"],
            f"{row['keep']:g}",
            str(row["experts"]),
            *shares,
            f"{row['nll']:.3f}",
            f"{row['coverage']:.1%}",
        )
    Console(width=None).print(table)


@contextmanager
def _bar() -> Iterator[Report]:
    """A progress bar on standard error; one line a stage of a task."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        lines: dict[tuple[str, str], Any] = {}

        def report(step: Step) -> None:
            key = step.task, step.stage
            if key not in lines:
                lines[key] = bar.add_task(f"{step.task}: {step.stage}", total=step.total)
            bar.update(lines[key], completed=step.done, total=step.total)

        yield report
