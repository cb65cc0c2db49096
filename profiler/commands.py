"""`moepager profile`: options in, one job, a table or one JSON object out."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from store.errors import InvalidInput
from store.records import TaskRecord

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from engine.engine import Engine
    from profiler.corpus import Corpus
    from profiler.job import Options
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
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; docs/methods.md lists them. Default: seven that need no extras."),
    ] = None,
    allocator: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable; docs/methods.md lists them. Default: uniform; in a search all that need no extras."
        ),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Find the best scorer and allocator on growing slices of --eval.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="The checkpoint that the model was tuned from, for router_growth.")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Repeatable share. Default: 1, 0.5, 0.25, 0.125.")] = None,
    embedder: Annotated[str, typer.Option(help="minilm, hash, or a sentence-transformers name or folder.")] = "minilm",
    description: Annotated[str, typer.Option(help="What the task is, for people.")] = "",
    own_answers: Annotated[
        int | None,
        typer.Option(min=1, help="Let the whole model answer items without a response, in at most so many tokens."),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream", help="Layer by layer, each expert read once. Default: if the model is over budget."
        ),
    ] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens of prompt and response together.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Items that run at once.")] = 16,
    device: Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda:0.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of the model's arithmetic.")] = None,
    progress_lines: Annotated[
        bool, typer.Option(hidden=True, help="For a parent process: progress as JSON lines, an end with the parent.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Score every expert for a task in one pass over its text, and measure what smaller sets of them can do.

    An interrupted run goes on where it stopped when it is started again.
    """
    from engine.config import EngineConfig
    from profiler.allocation import UNIFORM, choose_allocators
    from profiler.allocators import PLAIN
    from profiler.evidence import KEEPS
    from profiler.job import Options
    from profiler.scorers.registry import choose
    from store.hub import model_folder
    from store.sizes import parse_bytes

    started = time.perf_counter()
    choose(scorer)
    choose_allocators(allocator or [UNIFORM])
    budget = None if memory is None else parse_bytes(memory)
    text = _read(task, calibration), _read(task, evaluation, held_out=True)
    config = EngineConfig(
        model_folder(model),
        memory=budget,
        device=device,
        dtype=dtype,
        max_context=max_context,
        max_batch=batch,
        threads=threads,
        chunk_tokens=max(max_context or 2048, 4096 if budget is None else 0),  # an item goes through in one piece
    )
    options = Options(
        scorers=scorer,
        allocators=tuple(allocator or (PLAIN if search else (UNIFORM,))),
        keeps=tuple(keep or KEEPS),
        rows=batch,
        model_name=_model_name(model),
        base=base,
        stream=stream,
        search=search,
    )
    found = _run(config, store, TaskRecord(task, description), text, embedder, options, own_answers, progress_lines)
    found["seconds"] = round(time.perf_counter() - started, 3)
    _show(found)
    if as_json:
        typer.echo(json.dumps(found))


def _read(task: str, path: Path | None, held_out: bool = False) -> Corpus | None:
    """The text of one file; repeated lines are named. The generalist, and only it, has no calibration."""
    from profiler.corpus import read_corpus
    from store.records import GENERALIST

    if not held_out and (path is None) != (task == GENERALIST):
        made_of = f"--task {GENERALIST} takes no --calibration: it is made of the other tasks' profiles."
        raise InvalidInput("A task needs --calibration FILE." if path is None else made_of, param="calibration")
    if path is None:
        return None
    corpus = read_corpus(path)
    for found in corpus.duplicates[:5]:
        typer.echo(f"{corpus.source}, line {found.line} repeats line {found.first_line}: left out.", err=True)
    if len(corpus.duplicates) > 5:
        typer.echo(f"{corpus.source}: {len(corpus.duplicates)} repeated lines left out in all.", err=True)
    return corpus


def _model_name(model: str | None) -> str | None:
    """What the store calls the model: a hub id as it is, a folder by its own name."""
    if model is None:
        return "demo"
    return None if Path(model).expanduser().is_dir() else model


def _run(
    config: EngineConfig,
    url: str | None,
    task: TaskRecord,
    text: tuple[Corpus | None, Corpus | None],
    embedder: str,
    options: Options,
    own_answers: int | None,
    progress_lines: bool,
) -> dict[str, Any]:
    from engine.embedder import open_embedder
    from engine.engine import Engine
    from profiler.bar import bar
    from profiler.generalist import profile_generalist
    from profiler.job import profile_task
    from profiler.lines import lines
    from store.database import open_store

    calibration, evaluation = text
    embedding = None if calibration is None else open_embedder(embedder)
    told = lines() if progress_lines else bar()
    with open_store(url) as store, Engine.open(config) as engine, told as report:
        if own_answers is not None:
            calibration, evaluation = (_answer(engine, each, own_answers, task.name, report) for each in text)
        if calibration is None or embedding is None:
            made = profile_generalist(engine, store, evaluation, options=options, report=report)
        else:
            made = profile_task(
                engine, store, task, calibration, evaluation, embedder=embedding, options=options, report=report
            )
        return _summary(store, made)


def _answer(engine: Engine, corpus: Corpus | None, tokens: int, task: str, report: Report) -> Corpus | None:
    from profiler.answers import own_answers

    return None if corpus is None else own_answers(engine, corpus, tokens, task, report)


def _summary(store: Store, made: Profile) -> dict[str, Any]:
    from profiler.doubts import gates
    from profiler.scorers.registry import computable
    from profiler.search import reasons_of
    from profiler.stability import split_half_overlap
    from profiler.statistics import Statistics
    from store.intervals import wilson

    statistics = Statistics.from_arrays(made.statistics)
    judged = gates(statistics, made.tokens)
    selections = [
        {
            "selection": stored.id,
            "scorer": stored.scorer,
            "allocator": stored.allocator,
            "keep": stored.keep,
            "experts": len(stored.selection),
            "accuracy": evidence.accuracy,
            "accuracy_95": None if evidence.accuracy is None else wilson(evidence.accuracy, evidence.items),
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
        "statistics": [{"name": name, "shape": list(array.shape)} for name, array in statistics.arrays.items()],
        "stability": {one.name: split_half_overlap(statistics, one, 0.5) for one in computable(statistics)},
        "gates": asdict(judged),
        "doubts": judged.doubts(),
        "search": reasons_of(store, made.id),
        "evaluations": selections,
    }


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found['task']}: profile {found['profile_id']}, {found['tokens']} tokens, {found['seconds']:.1f} s"
    )
    for column in ("scorer", "allocator", "keep", "experts", "accuracy", "95%", "retention", "nll", "coverage"):
        table.add_column(column, justify="left" if column in {"scorer", "allocator"} else "right")
    for row in found["evaluations"]:
        accuracy, retention = ["-" if row[name] is None else f"{row[name]:.1%}" for name in ("accuracy", "retention")]
        low, high = row["accuracy_95"] or (None, None)
        table.add_row(
            row["scorer"],
            row["allocator"],
            f"{row['keep']:g}",
            str(row["experts"]),
            accuracy,
            "-" if low is None else f"{low:.0%}-{high:.0%}",
            retention,
            f"{row['nll']:.3f}",
            f"{row['coverage']:.1%}",
        )
    console = Console(width=None)
    console.print(table)
    judged = found["gates"]
    console.print(
        f"{judged['tokens_per_expert']:.0f} tokens an expert (median), {judged['unseen']:.1%} of the experts never "
        f"used, routing {judged['skew']:.1f} times as uneven as chance"
    )
    for line in (*found["search"], *found["doubts"]):
        console.print(line, markup=False, highlight=False)
