"""`moepager bench prompts`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.shown import AsJson, answer, table

LENGTHS = [16, 64, 128, 512]
USUAL = ["mask", "exact", "transformers"]


def prompts_command(
    model: Annotated[
        Path | None,
        typer.Option(help="Model folder, such as one of `bench make-model`; the bundled demo model if none."),
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Repeatable: tokens of a prompt; 16, 64, 128 and 512 if none.")
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="Repeatable: mask, exact, transformers. All if none; the first is 1.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in the mask arm's selection.")] = 0.25,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of every length in a round.")] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    llama_peer: Annotated[
        Path | None,
        typer.Option(help="One more arm: llama.cpp, built once into this folder, and the checkpoint converted there."),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(help="Repeatable: a copy of the model, such as one of `quantise`: one more arm like the first."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tokens a second of prompts whose experts are in memory: mask, exact, transformers, llama.cpp, with the same
    weights."""
    from benchmarks.llama_peer import open_peer
    from benchmarks.prompt_arm import ARMS
    from benchmarks.prompts import Terms, bench_prompts
    from store.errors import InvalidInput
    from store.home import bundled_model

    if unknown := set(arm or ()) - set(ARMS):
        raise InvalidInput(f"No arm {sorted(unknown)[0]!r}; there are {', '.join(ARMS)}.", param="arm")
    folder = model or bundled_model()
    peer = None if llama_peer is None else open_peer(llama_peer, folder)
    terms = Terms(folder, tuple(length or LENGTHS), keep, repeats, threads, peer, tuple(beside or ()))
    rows = [asdict(row) for row in bench_prompts(terms, arm or USUAL, rounds)]
    table("reading prompts", rows)
    if as_json:
        answer({"rows": rows}, as_json)
