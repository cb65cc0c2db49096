"""`moepager report`: the store in, one page out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from profiler.command_options import Model, StoreUrl
from store.errors import InvalidInput

PLOTS = "pip install 'moepager[plots]'"


def report(
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    model: Model = None,
    store: StoreUrl = None,
    task: Annotated[list[str] | None, typer.Option(help="Repeatable; every profiled task if none.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the experts at which tasks and halves are compared.")] = 0.25,
) -> None:
    """Write one HTML page on a model's profiles: heat maps, overlap, accuracy over memory, stability, and the tables.

    The page needs no network and holds no script.
    """
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise InvalidInput(f"The report's pictures need matplotlib, which is not installed: {PLOTS}.")
    from engine.card import ModelCard
    from engine.config import EngineConfig
    from engine.plan import plan_memory
    from profiler.report.gathered import gather_report
    from profiler.report.page import render
    from store.database import open_store
    from store.hub import model_folder

    folder = model_folder(model)
    card = ModelCard.read(folder)
    with open_store(store) as opened:
        found = gather_report(opened, card.fingerprint, keep, task or ())
        page = render(found, plan_memory(card, EngineConfig(folder)).slot_bytes, opened.name)
    _write(out, page)
    typer.echo(f"{out}: {len(found.tasks)} tasks of {found.model.name}, {len(page) / 2**20:.1f} MiB")


def _write(out: Path, page: str) -> None:
    """All of it or nothing: a page that is there is replaced at the end."""
    part = out.with_name(f"{out.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        part.replace(out)
    except OSError as error:
        raise InvalidInput(f"The report can't be written to {out}: {error.strerror}. Choose another --out.") from None
