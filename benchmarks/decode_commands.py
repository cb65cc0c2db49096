"""`moepager bench decode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.shown import AsJson, answer, table

SPEED = ("name", "tok_per_s", "ttft_s", "read_bytes", "active_bytes", "gb_per_s", "memory_gb_per_s", "ratio_to_memory")
MEMORY = ("name", "memory_cap", "peak_anon_bytes", "peak_cache_bytes", "peak_group_bytes", "smallest_cap", "failed")


def decode_command(
    model: Annotated[Path, typer.Option(help="Model folder, such as one of `bench make-model`.")],
    cap: Annotated[str | None, typer.Option(help="Hard memory cap of every arm, page cache included.")] = None,
    arm: Annotated[
        list[str] | None, typer.Option(help="mask, exact-lru, exact-ahead, transformers, accelerate.")
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in the mask arm's selection.")] = 0.25,
    prompt: Annotated[
        int, typer.Option(min=1, help="Tokens of the prompt, whose keys and values are read again.")
    ] = 16,
    tokens: Annotated[int, typer.Option(min=2)] = 48,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    llama_peer: Annotated[
        Path | None,
        typer.Option(help="One more arm: llama.cpp, built once into this folder, and the checkpoint converted there."),
    ] = None,
    descend: Annotated[
        bool, typer.Option("--descend", help="Find each arm's smallest cap, to 50 MiB, by running it under others.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tokens a second of mask, exact-LRU, transformers, accelerate offload, llama.cpp: same weights, same cap."""
    from benchmarks.decode import Terms, bench_decode
    from benchmarks.decode_arm import ARMS
    from benchmarks.llama_peer import open_peer
    from store.errors import InvalidInput
    from store.sizes import parse_bytes

    if unknown := set(arm or ()) - set(ARMS):
        raise InvalidInput(f"No arm {sorted(unknown)[0]!r}; there are {', '.join(ARMS)}.", param="arm")
    limit = None if cap is None else parse_bytes(cap)
    peer = None if llama_peer is None else open_peer(llama_peer, model)
    terms = Terms(model, limit, keep, tokens, threads, prompt, peer)
    arms, ratios = bench_decode(terms, arm or list(ARMS), rounds, descend=descend)
    rows = [asdict(one) for one in arms]
    table("decoding", _columns(rows, SPEED))
    table("memory", _columns(rows, MEMORY))
    answer({"arms": rows, "ratios": ratios}, as_json)


def _columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]
