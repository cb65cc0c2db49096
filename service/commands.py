"""`moepager serve`, `plan` and `doctor`: options in, settings out, then the file that does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.backup_commands import app as backup_commands
from service.key_commands import app as key_commands
from service.settings import Settings, load_settings
from store.quantisation import Way

app = typer.Typer()
app.add_typer(key_commands, name="keys")
app.add_typer(backup_commands)

Model = Annotated[str | None, typer.Option(help="A model folder or hub id. Default: the bundled demo model.")]
Memory = Annotated[str | None, typer.Option(help="Bytes for everything on the device, such as 2GiB or 512MiB.")]
StoreUrl = Annotated[str | None, typer.Option("--store", help="A database URL. Default: the embedded store.")]
Embedder = Annotated[str | None, typer.Option(help="minilm, hash, or a sentence-transformers name or folder.")]
Keep = Annotated[float | None, typer.Option(help="Share of the experts to serve with. Default: the most that fits.")]
Scorer = Annotated[str | None, typer.Option(help="Whose selections to serve. Default: the best evidence.")]
Active = Annotated[
    float | None, typer.Option(help="Share of a token's calls of experts to make, as profiled. Default: 1, all.")
]
Context = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together.")]
Batch = Annotated[int | None, typer.Option(help="Requests that are decoded at once.")]
Device = Annotated[str | None, typer.Option(help="Where the model runs, such as cpu or cuda:0.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
Threads = Annotated[int | None, typer.Option(help="Threads of the model's arithmetic.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


@app.command()
def serve(
    model: Model = None,
    memory: Memory = None,
    store: StoreUrl = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one. Default: 8000.")] = None,
    embedder: Embedder = None,
    unknown_task: Annotated[
        str | None, typer.Option(help="Queries of no task: exact, generalist or refuse. Default: exact.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Least similarity. Default: calibrated.")] = None,
    keep: Keep = None,
    scorer: Scorer = None,
    active: Active = None,
    mode: Annotated[
        str | None, typer.Option(help="Of requests that name none: mask, or auto (mask with a guard). Default: mask.")
    ] = None,
    alarm_rate: Annotated[
        float | None, typer.Option(help="Share of a task's own queries that the guard may stop. Default: 0.05.")
    ] = None,
    max_context: Context = None,
    max_batch: Batch = None,
    answer_tokens: Annotated[
        int | None, typer.Option(help="The limit where a request names none. Default: 512.")
    ] = None,
    queue_size: Annotated[int | None, typer.Option(help="Requests that may wait; more get a 503.")] = None,
    background_wait: Annotated[
        float | None, typer.Option(help="Seconds a background request waits for experts, then 503; it swaps nothing.")
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds an answer may take.")] = None,
    body_timeout: Annotated[float | None, typer.Option(help="For a request's body to arrive. Default: 30.")] = None,
    connections: Annotated[int | None, typer.Option(help="That may be open at once. Default: 512.")] = None,
    grace_seconds: Annotated[
        float | None, typer.Option(help="For answers under way when the service is told to stop. Default: 10.")
    ] = None,
    allowed_hosts: Annotated[
        str | None, typer.Option(help="More names, with commas, that a service without keys answers to. *: any.")
    ] = None,
    index: Annotated[Path | None, typer.Option(help="Folder of the vector index. Default: in memory.")] = None,
    job_memory: Annotated[str | None, typer.Option(help="Bytes for a profiling job. Default: as --memory.")] = None,
    keep_unmatched: Annotated[
        int | None, typer.Option(help="Queries of no task that are kept for proposals of new ones. Default: none.")
    ] = None,
    audit_days: Annotated[int | None, typer.Option(help="Days that retrieval decisions are kept. Default: 30.")] = None,
    redact: Annotated[str | None, typer.Option(help="A regular expression: what of their text is left out.")] = None,
    traces: Annotated[
        str | None, typer.Option(help="Where OpenTelemetry spans go: an OTLP endpoint over HTTP.")
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(help="Redis URL: `moepager worker`s run the jobs, rate limits are shared. Default: neither."),
    ] = None,
    reload_seconds: Annotated[float | None, typer.Option(help="Between two looks at the store. Default: 1.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    stand_ins: Annotated[
        int | None,
        typer.Option(help="Tasks whose stand-ins for experts are in memory at once. Default: 0, none serve."),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Decoding's matrix products: auto (own where built), own or torch.")
    ] = None,
) -> None:
    """Serve the model over HTTP: /v1/query, OpenAI's routes, /v1/retrieve, /v1/tasks."""
    settings = load_settings(**locals())
    from service.server import run_server

    run_server(settings)


@app.command()
def worker(
    redis: Annotated[str | None, typer.Option(help="Redis URL, the same as the service's.")] = None,
    model: Model = None,
    store: StoreUrl = None,
    memory: Memory = None,
    embedder: Embedder = None,
    max_context: Context = None,
    max_batch: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
) -> None:
    """Run the profiling jobs that services announce in Redis, one at a time, until it is told to stop."""
    settings = load_settings(**locals())
    from service.job_worker import serve_jobs

    serve_jobs(settings)


@app.command()
def plan(
    model: Model = None,
    memory: Memory = None,
    store: StoreUrl = None,
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    keep: Keep = None,
    scorer: Scorer = None,
    active: Active = None,
    max_context: Context = None,
    max_batch: Batch = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Show what fits into a memory budget, and what each task then costs, before anything is loaded."""
    options = {name: value for name, value in locals().items() if name not in ("task", "as_json")}
    settings = load_settings(**options)
    from service.planning import make_plan, show_plan

    found = make_plan(settings, task)
    _print(show_plan(found), found.json(), as_json)


@app.command("recipes")
def recipes_command(
    configs: Annotated[list[Path], typer.Argument(help="Published config.json files, named as the models are.")],
    memory: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: 8, 16 and 24 GiB less a tenth.")
    ] = None,
    quantised: Annotated[
        list[Way] | None, typer.Option(help="Repeatable: show each model's copy by `moepager quantise`, too.")
    ] = None,
    max_context: Context = None,
    max_batch: Batch = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show how many of a layer's experts a budget holds, from a config alone: nothing is downloaded or loaded."""
    from service.recipes import recipes, show_recipes
    from store.sizes import parse_bytes

    memories = [parse_bytes(text) for text in memory or ("7.2GiB", "14.4GiB", "21.6GiB")]
    settings = load_settings(max_context=max_context, max_batch=max_batch, device=device)
    context, batch = settings.max_context, settings.max_batch
    found = [
        recipe
        for config in configs
        for copy in (None, *(way.value for way in quantised or ()))
        for recipe in recipes(config, memories, context=context, batch=batch, device=settings.device, way=copy)
    ]
    _print(show_recipes(found), {"rows": [recipe.json() for recipe in found]}, as_json)


@app.command()
def doctor(
    model: Model = None,
    memory: Memory = None,
    store: StoreUrl = None,
    embedder: Embedder = None,
    index: Annotated[Path | None, typer.Option(help="Folder of the vector index.")] = None,
    as_json: Json = False,
) -> None:
    """Check the machine, its disk, the store, the index, the embedder and the model."""
    settings: Settings = load_settings(**{name: value for name, value in locals().items() if name != "as_json"})
    from service.doctor import examine, show_checks

    checks = examine(settings)
    _print(show_checks(checks), {"checks": [check.json() for check in checks]}, as_json)
    if not all(check.ok for check in checks):
        raise typer.Exit(2)


def _print(text: str, answer: dict[str, Any], as_json: bool) -> None:
    typer.echo(text)
    if as_json:
        typer.echo(json.dumps(answer))
