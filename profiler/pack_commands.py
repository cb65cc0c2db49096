"""`moepager pack`: a smaller checkpoint of a model, made for a task; `moepager quantise`: one in four bits, for any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from profiler.command_options import Context, Memory, Model, StoreUrl, Threads
from store.quantisation import Way

app = typer.Typer()


@app.command()
def pack(
    out: Annotated[Path, typer.Option(help="The new model's folder, which must not exist yet.")],
    task: Annotated[str, typer.Option(help="The task's name.")],
    calibration: Annotated[Path, typer.Option(help="JSONL, as for `moepager profile`.")],
    way: Annotated[
        str,
        typer.Option(
            help="A channel scorer (camera, heapr, heapr_used, heapr_joint, heapr_unit, coverage, wifv, router_wanda, "
            "random), or experts, dern, sub_moe: docs/methods.md says what they do."
        ),
    ] = "camera",
    channels: Annotated[float, typer.Option(help="The share of every expert's channels that stays.")] = 1.0,
    experts: Annotated[float, typer.Option(help="The share of each layer's experts that stays.")] = 1.0,
    strips: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keep all, each expert cut into this many equal strips of its channels, the best of the way first, "
            "that are paged and selected one by one. The more strips, the less memory a task can do with; but of "
            "less than 128 channels each, batches decode at 0.5 to 0.8 of the speed: `moepager bench strip-speed`.",
        ),
    ] = 1,
    scorer: Annotated[str, typer.Option(help="By which experts stay.")] = "gate",
    compensate: Annotated[
        bool, typer.Option("--compensate", help="Put what lost channels give on the average into the experts' bias.")
    ] = False,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="JSONL of other items: the card says what the pack does on them.")
    ] = None,
    model: Model = None,
    store: StoreUrl = None,
    memory: Memory = None,
    max_context: Context = None,
    batch: Annotated[int, typer.Option(min=1, help="Items that run at once.")] = 16,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Write a new checkpoint with fewer channels or experts, which every engine loads, and a card of what it can do."""
    from engine.config import EngineConfig
    from profiler.bar import bar
    from profiler.corpus import read_corpus
    from profiler.options import Options
    from profiler.pack_job import pack_task
    from profiler.pack_ways import Pack
    from store.database import open_store
    from store.hub import model_folder
    from store.records import TaskRecord
    from store.sizes import parse_bytes

    wanted = Pack(way, channels, experts, scorer, compensate, strips)
    budget = None if memory is None else parse_bytes(memory)
    chunk = max(max_context or 2048, 4096 if budget is None else 0)  # an item goes through in one piece
    config = EngineConfig(
        model_folder(model),
        memory=budget,
        max_context=max_context,
        max_batch=batch,
        threads=threads,
        chunk_tokens=chunk,
    )
    texts = read_corpus(calibration), None if evaluation is None else read_corpus(evaluation)
    options = Options(rows=batch, model_name="demo" if model is None else None)
    with open_store(store) as opened, bar() as report:
        card = pack_task(config, opened, TaskRecord(task), texts, wanted, out, options, report)
    _say(out, card, as_json=as_json)


@app.command()
def quantise(
    out: Annotated[Path, typer.Option(help="The new model's folder, which must not exist yet.")],
    evaluation: Annotated[
        Path | None, typer.Option("--eval", help="JSONL, as for `moepager profile`: the card says what both do on it.")
    ] = None,
    way: Annotated[
        Way, typer.Option(help="mxfp4: 4.25 bits a weight; int4: 4.5, nearer to the model; fp8: 8, nearer still.")
    ] = Way.MXFP4,
    model: Model = None,
    max_context: Context = None,
    batch: Annotated[int, typer.Option(min=1, help="Items that run at once.")] = 16,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Write a copy of a model with its experts in four or eight bits: a quarter or half of the bytes on disk and in
    memory."""
    from engine.config import EngineConfig
    from profiler.bar import bar
    from profiler.corpus import read_corpus
    from profiler.pack_job import quantise_and_measure
    from store.hub import model_folder

    chunk = max(max_context or 2048, 4096)  # an item goes through in one piece
    config = EngineConfig(
        model_folder(model), max_context=max_context, max_batch=batch, threads=threads, chunk_tokens=chunk
    )
    text = None if evaluation is None else read_corpus(evaluation)
    with bar() as report:
        card = quantise_and_measure(config, text, out, way.value, batch, report)
    worst = max(card["relative_error"])
    typer.echo(f"Rounding changed weights by {worst:.1%} of their size (root mean square, worst layer).")
    _say(out, card, as_json=as_json)


@app.command()
def convert(
    out: Annotated[Path, typer.Option(help="The new model's folder, which must not exist yet.")],
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Write a copy of a GPTQ model (four bits, symmetric) in a layout that is served: the same numbers, turned over."""
    from profiler.bar import bar
    from profiler.convert import convert_model
    from store.hub import model_folder

    with bar() as report:
        card = convert_model(model_folder(model), out, report)
    typer.echo(f"{out}: {card['matrices']:,} matrices turned over, experts of {card['expert_bytes']:,} bytes")
    if card["dtype"] == "float16":
        typer.echo("Its config says float16, which torch computes: with --dtype bfloat16 our own products do.")
    if as_json:
        typer.echo(json.dumps(card))


def _say(out: Path, card: dict[str, Any], *, as_json: bool) -> None:
    before, after = card["expert_bytes"]
    typer.echo(
        f"{out}: experts of {after:,} bytes, where {card['packed_from'][:16]} has {before:,} ({after / before:.1%})"
    )
    if found := card["evaluation"]:
        shown = [
            f"{name}: accuracy {found[name]['accuracy']}, nll {found[name]['nll']:.3f}" for name in ("whole", "pack")
        ]
        typer.echo("; ".join(shown) + f" on {found['pack']['items']} items")
    if as_json:
        typer.echo(json.dumps(card))
