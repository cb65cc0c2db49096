"""`moepager profile`: options in, one job, a table or one JSON object out."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from profiler.command_line import again
from profiler.command_options import Context, Device, Dtype, Embedder, Memory, Model, StoreUrl, Threads
from profiler.export_commands import export
from profiler.report.commands import report
from store.records import TaskRecord

if TYPE_CHECKING:
    from engine.engine import Engine
    from profiler.asked import Asked
    from profiler.corpus import Corpus
    from profiler.parts import Part
    from profiler.progress import Report

app = typer.Typer()
app.command("report")(report)
app.command("export")(export)

TaskName = Annotated[str, typer.Option(help="The task's name; `generalist` is the mean of all profiled tasks.")]
Calibration = Annotated[
    Path | None, typer.Option(help='JSONL: {"prompt"}, {"prompt", "response"} or {"messages"} a line.')
]
Evaluation = Annotated[
    Path | None, typer.Option("--eval", help="JSONL of other items: without it no evidence, and no mask mode.")
]
Others = Annotated[Path | None, typer.Option(help="JSONL of other tasks' items: what a selection costs off its task.")]
Scorers = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable; docs/methods.md lists them. Default: seven, in a search all that need no extras."),
]
Allocators = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable; docs/methods.md lists them. Default: uniform, in a search all that need no extras."),
]
StandIns = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable: nothing, novice (an expert left out gives its mean output). Default: nothing."),
]
Search = Annotated[
    bool, typer.Option("--search", help="Find the best scorer and allocator on growing slices of --eval.")
]
Base = Annotated[Path | None, typer.Option(help="The checkpoint that the model was tuned from, for router_growth.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="Repeatable: a share of the experts, or bytes such as 512MiB. Default: 1, 0.5, 0.25, 0.125."),
]
Draws = Annotated[
    int, typer.Option(min=0, help="Draw the calibration text anew so often, a pass each, to see how sure a size is.")
]
Evolve = Annotated[
    int, typer.Option(min=0, help="Breed so many children of the selections at each size (EEP), on calibration items.")
]
Active = Annotated[
    list[float] | None,
    typer.Option(
        help="Repeatable: a share of a token's calls of experts, such as 0.5, at which the best selection of each size "
        "is measured too, the calls shared out to the layers (LExI). Faster answers, not less memory."
    ),
]
Description = Annotated[str, typer.Option(help="What the task is, for people.")]
OnlyModel = Annotated[
    str | None, typer.Option(help="Refuse any other model than the one whose fingerprint this is (`doctor` says it).")
]
OwnAnswers = Annotated[
    int | None,
    typer.Option(min=1, help="Let the whole model answer items without a response, in at most so many tokens."),
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream", help="Layer by layer, each expert read once. Default: if the model is over budget."
    ),
]
PartOf = Annotated[
    str | None,
    typer.Option(
        "--part",
        help="2/4 sums up one of four parts of the text and stores it; run the others on other machines with the same "
        "store and options. all, or nothing: merge the parts that are there. none: run the whole text here.",
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Items that run at once.")]
Lines = Annotated[
    bool, typer.Option(hidden=True, help="For a parent process: progress as JSON lines, an end with the parent.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


@app.command()
def profile(
    context: typer.Context,
    task: TaskName,
    calibration: Calibration = None,
    evaluation: Evaluation = None,
    others: Others = None,
    model: Model = None,
    fingerprint: OnlyModel = None,
    store: StoreUrl = None,
    memory: Memory = None,
    scorer: Scorers = None,
    allocator: Allocators = None,
    stand_in: StandIns = None,
    search: Search = False,
    base: Base = None,
    keep: Keep = None,
    draws: Draws = 0,
    evolve: Evolve = 0,
    active: Active = None,
    embedder: Embedder = "minilm",
    description: Description = "",
    own_answers: OwnAnswers = None,
    stream: Stream = None,
    part: PartOf = None,
    max_context: Context = None,
    batch: Batch = 16,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = None,
    progress_lines: Lines = False,
    as_json: AsJson = False,
) -> None:
    """Score every expert for a task in one pass over its text, and measure what smaller sets of them can do.

    An interrupted run goes on where it stopped when it is started again. Several machines that share a store may each
    take a part of the text: once all parts are there, the same command without --part does the rest.
    """
    given = dict(locals())
    from profiler.asked import Asked
    from profiler.summary import show
    from store.errors import PartsMissing

    started = time.perf_counter()
    asked = Asked(**{name: given[name] for name in Asked.__slots__})
    try:
        if (mine := asked.one_part()) is not None:
            _run_part(context, asked, mine, store, own_answers, progress_lines, as_json)
            return
        found = _run(asked, store, TaskRecord(task, description), embedder, own_answers, progress_lines)
    except KeyboardInterrupt:
        typer.echo("Stopped. What is finished is kept: the same command goes on from there.", err=True)
        raise
    except PartsMissing as error:
        for missing in error.parts:
            typer.echo(again(context, part=missing), err=True)
        raise
    found["seconds"] = round(time.perf_counter() - started, 3)
    show(found)
    if as_json:
        typer.echo(json.dumps(found))


def _run(
    asked: Asked, url: str | None, task: TaskRecord, embedder: str, answer_tokens: int | None, progress_lines: bool
) -> dict[str, Any]:
    from engine.embedder import open_embedder
    from engine.engine import Engine
    from profiler.bar import bar
    from profiler.generalist import profile_generalist
    from profiler.job import profile_task
    from profiler.lines import lines
    from profiler.summary import summary
    from store.database import open_store

    options, config, texts = asked.options(), asked.config(), asked.texts()  # names first: they are quick to refuse
    embedding = None if asked.calibration is None else open_embedder(embedder)
    told = lines() if progress_lines else bar()
    with open_store(url) as store, Engine.open(config) as engine, told as report:
        asked.check_model(engine.card)
        calibration, evaluation, others = (_answer(engine, each, answer_tokens, task.name, report) for each in texts)
        if calibration is None or embedding is None:
            return summary(store, profile_generalist(engine, store, evaluation, options=options, report=report))
        made = profile_task(
            engine,
            store,
            task,
            calibration,
            evaluation,
            embedder=embedding,
            others=others,
            options=options,
            report=report,
        )
        return summary(store, made)


def _run_part(
    context: typer.Context,
    asked: Asked,
    part: Part,
    url: str | None,
    answer_tokens: int | None,
    progress_lines: bool,
    as_json: bool,
) -> None:
    """What is asked beside the pass (--eval, --search, ...) is checked here, and done by the run that merges."""
    from engine.engine import Engine
    from profiler.bar import bar
    from profiler.lines import lines
    from profiler.parts import profile_part
    from store.database import open_store

    options, config, (text, _, _) = asked.options(), asked.config(), asked.texts()
    assert text is not None, "the generalist has no parts, and a task without a text is refused"
    told = lines() if progress_lines else bar()
    with open_store(url) as store, Engine.open(config) as engine, told as report:
        asked.check_model(engine.card)
        calibration = _answer(engine, text, answer_tokens, asked.task, report)
        assert calibration is not None
        made = profile_part(engine, store, asked.task, calibration, part, options, report)
    typer.echo(f"Part {part} of {asked.task} {'is stored' if made.computed else 'was there'}: {made.items} items.")
    for missing in made.missing:
        typer.echo(f"Missing: {again(context, part=str(missing))}")
    if not made.missing:
        typer.echo(f"All {part.of} parts are there. Next: {again(context, part='all')}")
    if as_json:
        missing_parts = [str(each) for each in made.missing]
        told_as = {"task": asked.task, "part": str(part), "items": made.items, "computed": made.computed}
        typer.echo(json.dumps(told_as | {"missing": missing_parts}))


def _answer(engine: Engine, corpus: Corpus | None, tokens: int | None, task: str, report: Report) -> Corpus | None:
    from profiler.answers import own_answers

    return corpus if corpus is None or tokens is None else own_answers(engine, corpus, tokens, task, report)
