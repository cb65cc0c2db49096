"""`moepager export`: a stored selection as another engine reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from profiler.command_options import Model, StoreUrl


def export(
    out: Annotated[Path, typer.Option(help="The file, which must not exist yet (.pt for ktransformers).")],
    form: Annotated[
        str,
        typer.Option("--form", help="json, vllm-riy, vllm-ascend or ktransformers: docs/methods.md says what each is."),
    ] = "json",
    task: Annotated[str | None, typer.Option(help="Of its newest profile with evidence.")] = None,
    keep: Annotated[float | None, typer.Option(help="The share that the selection keeps.")] = None,
    scorer: Annotated[str | None, typer.Option(help="By which it was chosen.")] = None,
    allocator: Annotated[str | None, typer.Option(help="By which its size was spread over the layers.")] = None,
    selection: Annotated[str | None, typer.Option(help="The selection's id, in place of the four above.")] = None,
    model: Model = None,
    store: StoreUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Write down which experts a task needs, in the form of another engine, and say how to start that on it."""
    from profiler.export import export as write
    from profiler.export import subject_by_id, subject_of
    from profiler.exports.base import Shape
    from profiler.exports.registry import choose
    from store.database import open_store
    from store.errors import InvalidInput
    from store.hub import model_folder

    chosen = choose(form)
    if (task is None) == (selection is None):
        raise InvalidInput("Name a task, with --keep, --scorer and --allocator as need be, or a --selection.")
    if selection is not None and (keep, scorer, allocator) != (None, None, None):
        raise InvalidInput("--selection names just one: leave out --keep, --scorer and --allocator.")
    shape = Shape.read(model_folder(model))
    with open_store(store) as opened:
        subject = (
            subject_of(opened, shape, task, keep, scorer, allocator)
            if task is not None
            else subject_by_id(opened, shape, str(selection))
        )
    write(subject, chosen, out)
    stored, accuracy = subject.stored, None if subject.evidence is None else subject.evidence.accuracy
    told = "no evidence" if subject.evidence is None else f"accuracy {accuracy}, nll {subject.evidence.nll:.3f}"
    typer.echo(f"{out}: {len(stored.selection)} experts of {stored.id} ({told} in moepager)")
    typer.echo(f"for {chosen.serves}\n  {chosen.options(subject, out)}")
    if as_json:
        found = {"out": str(out), "form": form, "selection": stored.id, "experts": len(stored.selection)}
        typer.echo(json.dumps(found | {"accuracy": accuracy, "options": chosen.options(subject, out)}))
