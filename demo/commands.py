"""`moepager demo`: the whole way, offline and online, on the bundled model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from demo.tour import Shown

AMPLE = 1 << 40  # a budget that holds everything, but is one: without any, the plan has more workspace

app = typer.Typer()
group = typer.Typer(name="demo-tools", help="What the demo is made of.", no_args_is_help=True)

StoreUrl = Annotated[str | None, typer.Option("--store", help="Database URL; a fresh temporary store by default.")]
Keep = Annotated[float, typer.Option("--keep", min=0, max=1, help="Share of the experts that the memory budget holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")]


@app.command()
def demo(store: StoreUrl = None, keep: Keep = 0.25, as_json: AsJson = False) -> None:
    """Profile the bundled model's tasks, start the service, ask one query a task, and print answers and receipts."""
    from demo.tour import tour
    from store.home import bundled_model

    with tempfile.TemporaryDirectory(prefix="moepager-demo-") as folder:
        url = store or f"sqlite:///{folder}/store.db"
        prepare_store(url)
        memory = memory_for(bundled_model(), keep)
        typer.echo(f"\nServing under a budget of {memory / 2**20:.1f} MiB, which holds {keep:.0%} of the experts.\n")
        shown = []
        for one in tour(url, memory, Path(folder) / "serve.log"):
            typer.echo(describe(one))
            shown.append(one)
    right = sum(one.answer.strip() == one.expected for one in shown)
    found = sum(one.retrieved == one.task for one in shown)
    typer.echo(f"{found} of {len(shown)} queries found their task, {right} answers are exactly right.")
    if as_json:
        queries = [
            {"task": s.task, "retrieved": s.retrieved, "answer": s.answer, "expected": s.expected, "receipt": s.receipt}
            for s in shown
        ]
        typer.echo(json.dumps({"queries": queries}))


@group.command("prepare")
def prepare_command(store: StoreUrl = None) -> None:
    """Profile the bundled model's tasks into a store; what is there already is kept."""
    from store.home import default_store_url

    prepare_store(store or default_store_url())


@group.command("picture")
def picture_command(out: Path = Path("docs/console.png"), store: StoreUrl = None, keep: Keep = 0.25) -> None:
    """Take the console's picture in a headless Chromium, of a service under the demo's budget."""
    from demo.picture import take_picture
    from store.home import bundled_model, default_store_url

    url = store or default_store_url()
    prepare_store(url)
    take_picture(url, memory_for(bundled_model(), keep), out)


@group.command("data")
def data_command() -> None:
    """Write the tasks' fixed files of calibration, evaluation and test items again, the same bytes each time."""
    from demo.corpus import write_data

    write_data()


def prepare_store(url: str) -> None:
    from demo.prepare import prepare
    from engine.embedder import open_embedder
    from profiler.bar import bar
    from store.database import open_store
    from store.home import bundled_model

    with open_store(url) as store, bar() as report:
        prepare(store, open_embedder("minilm"), bundled_model(), report=report)


def memory_for(model: Path, keep: float) -> int:
    """The budget under which this share of every layer's experts is resident, as the demo's service plans it."""
    from demo.prepare import DTYPE
    from demo.tour import MAX_BATCH, MAX_CONTEXT
    from engine.card import ModelCard
    from engine.config import EngineConfig
    from engine.plan import plan_memory

    bounded = EngineConfig(model, memory=AMPLE, max_context=MAX_CONTEXT, max_batch=MAX_BATCH, dtype=DTYPE)
    return plan_memory(ModelCard.read(model), bounded).memory_for(keep)


def describe(one: Shown) -> str:
    receipt = one.receipt
    mark = "=" if one.answer.strip() == one.expected else f"(expected {one.expected!r})"
    return (
        f"{one.task}: {one.query}\n"
        f"  -> {one.answer!r} {mark}\n"
        f"  task {one.retrieved} (similarity {receipt['similarity']:.2f}), {receipt['mode']} mode, "
        f"keep {receipt['keep']:g}, coverage {receipt['coverage']:.3f}\n"
        f"  {receipt['experts_paged']} of {receipt['experts']} experts paged, {receipt['bytes_paged']:,} bytes "
        f"in {receipt['swap_ms']:.0f} ms, first token after {receipt['ttft_ms']:.0f} ms\n"
    )
