"""`moepager bench ...`: each command prints what the README states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.decode_commands import decode_command
from benchmarks.mixed_commands import mixed_command
from benchmarks.model_commands import families_command, make_model_command
from benchmarks.prompt_commands import prompts_command
from benchmarks.shown import AsJson, answer, table
from benchmarks.strip_commands import strip_speed_command, strips_command

if TYPE_CHECKING:
    from benchmarks.retrieve import Vectorise

app = typer.Typer(
    name="bench", help="Measure: every claim of the README is one of these commands.", no_args_is_help=True
)

Model = Annotated[Path | None, typer.Option("--model", help="Model folder; the bundled demo model by default.")]


app.command("make-model")(make_model_command)
app.command("families")(families_command)
app.command("decode")(decode_command)
app.command("prompts")(prompts_command)
app.command("strips")(strips_command)
app.command("strip-speed")(strip_speed_command)
app.command("mixed")(mixed_command)


@app.command("load")
def load_command(
    model: Model = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in a selection, at most 0.5.")] = 0.5,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    reader: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable: direct, safetensors, mmap, pread, runai, fastsafetensors. raw and own always run."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Page a selection cold, between two raw direct reads of the same bytes. Steady from a selection of 1 GiB up."""
    from benchmarks.load import bench_load
    from store.home import bundled_model

    found = asdict(bench_load(model or bundled_model(), keep, runs, reader or ()))
    table("cold reads of the same bytes", found["readers"])
    answer(found, as_json)


@app.command("ttft")
def ttft_command(
    model: Model = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in the selection, at most 0.5.")] = 0.5,
    prompts: Annotated[str, typer.Option(help="Prompt lengths in tokens, by commas.")] = "32,128,256,512",
    runs: Annotated[int, typer.Option(min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """A request's time to first token with its experts on the disk, beside reading them and beside its prefill."""
    from benchmarks.ttft import bench_ttft
    from store.home import bundled_model

    rows = [asdict(row) for row in bench_ttft(model or bundled_model(), keep, _numbers(prompts), runs)]
    table("time to first token", rows)
    if as_json:
        answer({"rows": rows}, as_json)


def _numbers(text: str) -> list[int]:
    from store.errors import InvalidInput

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise InvalidInput(
            f"--prompts wants whole numbers above 0, separated by commas; got {text!r}.", param="prompts"
        )
    return numbers


@app.command("profile")
def profile_command(
    model: Model = None,
    items: Annotated[int, typer.Option(min=1, help="Calibration items of every demo task.")] = 16,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    cap: Annotated[
        str | None, typer.Option(help="Stream in a control group of this size, below the model's: 1000MiB.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The profiling pass beside a plain forward of the same tokens; its peak memory where the model does not fit."""
    from benchmarks.profile_pass import bench_profile
    from store.home import bundled_model
    from store.sizes import parse_bytes

    answer(asdict(bench_profile(model or bundled_model(), items, runs, parse_bytes(cap) if cap else None)), as_json)


@app.command("quality")
def quality_command(
    items: Annotated[int, typer.Option(min=1, help="Test items a task, at most 100.")] = 100,
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; all of the demo's tasks if none.")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="Repeatable, or `all`; the seven defaults of `profile` if none.")
    ] = None,
    allocator: Annotated[list[str] | None, typer.Option(help="Repeatable, or `all`; uniform if none.")] = None,
    stand_in: Annotated[list[str] | None, typer.Option(help="Repeatable, or `all`; nothing if none.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Bootstrap draws of the calibration text.")] = 0,
    few_shot: Annotated[
        str, typer.Option(help="Numbers of calibration items, such as 5,10,25, each drawn as often as --draws says.")
    ] = "",
    automatic: Annotated[
        bool, typer.Option(help="Also what `profile --search` would choose, from each draw of the text.")
    ] = False,
    evolve: Annotated[
        int,
        typer.Option(min=0, help="Also what `profile --evolve` breeds of these scorers' choices, so many children."),
    ] = 0,
    active: Annotated[
        list[float] | None,
        typer.Option(help="Repeatable: each selection with that share of a token's calls, too, by every rule."),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is measured: a killed run goes on from it.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the accuracy-against-memory picture here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Every scorer, allocator and stand-in at every size on the demo model's held-out test items."""
    from benchmarks.quality import bench_quality
    from benchmarks.quality_grid import grid_of
    from benchmarks.quality_means import means
    from profiler.bar import bar

    grid = grid_of(items, task, scorer, allocator, stand_in, draws, few_shot, automatic, evolve, active)
    with bar() as report:
        rows = bench_quality(grid, report, checkpoint)
    averages = means(rows)
    table("mean over the tasks", [asdict(mean) for mean in averages])
    if plot is not None:
        from benchmarks.quality_plot import plot_quality

        plot_quality(rows, averages, plot)
    if as_json:
        answer({"rows": [asdict(row) for row in rows], "means": [asdict(mean) for mean in averages]}, as_json)


@app.command("rules")
def rules_command(
    items: Annotated[int, typer.Option(min=1, help="Test items a task, at most 100.")] = 40, as_json: AsJson = False
) -> None:
    """Rules that run fewer of the chosen experts (PESF, NAEE's skipping, LExI), and selections of a prompt's own."""
    from benchmarks.prompt_selections import bench_prompts
    from benchmarks.routing_rules import bench_rules, rule_means
    from demo.tasks.registry import TASKS
    from profiler.bar import bar

    with bar() as report:
        rows = bench_rules([task.name for task in TASKS], items, report)
        rows += bench_prompts([task.name for task in TASKS], items, report)
    averages = [asdict(row) for row in rule_means(rows)]
    table("mean over the tasks", averages)
    if as_json:
        answer({"rows": [asdict(row) for row in rows], "means": averages}, as_json)


@app.command("eliminations")
def eliminations_command(
    items: Annotated[int, typer.Option(min=1, help="Test items a task, at most 100.")] = 50,
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; sql, python and geography if none.")] = None,
    as_json: AsJson = False,
) -> None:
    """NAEE's elimination of experts down to an eighth, on more tokens, on answers, by norms, with swaps."""
    from benchmarks.eliminations import bench_eliminations
    from profiler.bar import bar

    with bar() as report:
        rows = [asdict(row) for row in bench_eliminations(task or ["sql", "python", "geography"], items, report)]
    table("an eighth of the experts", rows)
    if as_json:
        answer({"rows": rows}, as_json)


@app.command("packs")
def packs_command(
    items: Annotated[int, typer.Option(min=1, help="Test items a task, at most 100.")] = 40,
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; all of the demo's tasks if none.")] = None,
    way: Annotated[list[str] | None, typer.Option(help="Repeatable; every way to pack if none.")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Repeatable; 0.5, 0.25 and 0.125 if none.")] = None,
    draws: Annotated[int, typer.Option(min=0, help="Draws of the calibration text; 0 takes it as it is.")] = 0,
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is measured: a killed run goes on from it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Packed models and stand-ins for experts beside limited routers, at equal bytes, on the demo's test items."""
    from benchmarks.packs import PACK_WAYS, bench_packs, pack_means
    from demo.tasks.registry import TASKS
    from profiler.bar import bar

    tasks = task or [one.name for one in TASKS]
    with bar() as report:
        rows = bench_packs(tasks, keep or [0.5, 0.25, 0.125], way or PACK_WAYS, items, draws, report, checkpoint)
    averages = pack_means(rows)
    table("mean over the tasks", [asdict(mean) for mean in averages])
    if as_json:
        answer({"rows": [asdict(row) for row in rows], "means": [asdict(mean) for mean in averages]}, as_json)


@app.command("retrieve")
def retrieve_command(
    public: Annotated[bool, typer.Option(help="Also on public text; see benchmarks/public-text.txt.")] = False,
    largest: Annotated[int, typer.Option(min=1000, help="Vectors in the largest index that is searched.")] = 1_000_000,
    embedder: str = "minilm",
    as_json: AsJson = False,
) -> None:
    """Accuracy, abstention and latency of retrieval: sentence embedding beside PreMoe's router signature."""
    from benchmarks.retrieval_data import demo_set, kinds_set, mmlu_set, sources_set
    from benchmarks.retrieve import embed_ms_p50, measure, search_ms_p50
    from benchmarks.signature_vectors import signatures
    from engine.embedder import open_embedder
    from store.home import bundled_model

    sentence = open_embedder(embedder)
    sets = [demo_set(), *((sources_set(), kinds_set(), mmlu_set()) if public else ())]
    with signatures(bundled_model()) as signature:
        ways: Sequence[tuple[str, Vectorise, bool]] = (
            (embedder, sentence.embed, True),
            ("signature", signature, False),
        )
        found = [measure(data, name, vectorise, cosine=cosine) for data in sets for name, vectorise, cosine in ways]
        latency = {name: embed_ms_p50(vectorise, sets[0].queries.texts) for name, vectorise, _ in ways}
    sizes = [size for size in (1_000, 10_000, 100_000, 1_000_000) if size <= largest]
    table("retrieval", [asdict(one) for one in found])
    answer(
        {
            "accuracy": found[0].accuracy,
            "abstain_auroc": found[0].abstain_auroc,
            "embed_ms_p50": latency[embedder],
            "signature_ms_p50": latency["signature"],
            "search_ms_p50": search_ms_p50(sizes, sentence.dimension),
            "sets": [asdict(one) for one in found],
        },
        as_json,
    )


@app.command("service")
def service_command(
    requests: Annotated[int, typer.Option(min=2, help="Prompts, each to every arm.")] = 60,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 16,
    idle: Annotated[int, typer.Option(min=0, help="Silent streams beside the working clients.")] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Runs with and without idle streams.")] = 5,
    embedder: str = "minilm",
    as_json: AsJson = False,
) -> None:
    """What HTTP adds to the engine's time for a request, and what idle streams cost."""
    from benchmarks.service_overhead import Work, bench_service

    work = Work(requests=requests, tokens=tokens, idle=idle, rounds=rounds, embedder=embedder)
    arms, throughput = bench_service(work)
    table("the engine alone and over HTTP", [asdict(arm) for arm in arms])
    answer({"arms": [asdict(arm) for arm in arms], **throughput, "work": asdict(work)}, as_json)


@app.command("guard")
def guard_command(
    keep: Annotated[list[float] | None, typer.Option(help="Repeatable share of the experts.")] = None,
    items: Annotated[int, typer.Option(min=1, max=100, help="Test items a task, and as many of the others.")] = 100,
    alarm_rate: Annotated[float, typer.Option(help="False alarms that the bound is drawn for.")] = 0.05,
    as_json: AsJson = False,
) -> None:
    """Mode auto on the demo's test items, of a selection's own task and of others: alarms, accuracy, cost."""
    from benchmarks.guard import bench_guard, guard_means
    from profiler.bar import bar

    with bar() as report:
        rows = bench_guard(keep or (0.5, 0.25, 0.125), items, alarm_rate, report)
    flat = [{name: value for name, value in asdict(row).items() if name not in ("own", "others")} for row in rows]
    table("the guard", flat)
    means = [asdict(mean) for mean in guard_means(rows)]
    for mean in means:
        answer(mean, as_json=False)
    if as_json:
        answer({"rows": [asdict(row) for row in rows], "means": means}, as_json)


@app.command("soak")
def soak_command(
    minutes: Annotated[float, typer.Option(help="How long clients ask.")] = 30.0,
    clients: Annotated[int, typer.Option(min=1, help="That ask at a time.")] = 6,
    keep: Annotated[float, typer.Option(help="Share of the experts that the budget holds.")] = 0.4,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Mixed traffic with faults against a real service: wrong answers, leases left, memory. Exits 1 if one is amiss."""
    from benchmarks.soak import bench_soak

    found = bench_soak(minutes, clients, keep, seed)
    answer({**asdict(found), "flat": found.flat, "ok": found.ok}, as_json)
    if not found.ok:
        raise typer.Exit(1)


@app.command("cache")
def cache_command(
    model: Model = None,
    keep: Annotated[list[float] | None, typer.Option(help="Repeatable share of the experts held.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in each workload.")] = 200,
    scorer: Annotated[str, typer.Option(help="Whose profile is replayed.")] = "easy_ep",
    traffic: Annotated[bool, typer.Option("--traffic", help="Mixes of masked and exact requests instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Replay recorded routing through profile, LRU, LFU, Belady, a global and a random set at equal bytes.

    With --traffic: mixes of masked and exact requests through the engine's own table of slots, beside a plain LRU. One
    --keep at most, 0.25 where none is given.
    """
    from benchmarks.cache import bench_cache, bench_mixes, verdicts
    from benchmarks.cache_traffic import traffic_verdict
    from store.home import bundled_model

    if traffic:
        if len(keep or ()) > 1:
            raise typer.BadParameter(f"--traffic takes one --keep, {len(keep or ())} were given.")
        rows = bench_mixes(model or bundled_model(), (keep or [0.25])[0], requests, scorer)
        table("masked and exact requests, replayed", [asdict(row) for row in rows])
        typer.echo(traffic_verdict(rows), err=True)
        answer({"traffic": [asdict(row) for row in rows], "verdicts": [traffic_verdict(rows)]}, as_json)
        return
    arms = bench_cache(model or bundled_model(), keep or (0.5, 0.25, 0.125), requests, scorer)
    table("recorded routing, replayed", [asdict(arm) for arm in arms])
    for line in verdicts(arms):
        typer.echo(line, err=True)
    answer({"arms": [asdict(arm) for arm in arms], "verdicts": verdicts(arms)}, as_json)
