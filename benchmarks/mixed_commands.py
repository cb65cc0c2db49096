"""`moepager bench mixed`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.shown import AsJson, answer, table

SPEED = ("name", "tok_per_s", "low", "high", "p50_s", "p99_s", "ttft_p50_s", "ttft_p99_s")
PARTS = ("name", "decode_s", "prompt_s", "read_s", "step_rows", "step_experts", "step_bytes", "bytes_paged")


def mixed_command(
    model: Annotated[Path | None, typer.Option(help="Model folder; the bundled demo model by default.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the experts in a task's selection.")] = 0.25,
    scorer: Annotated[
        str | None, typer.Option(help="Profile the demo's tasks with it; random selections by default.")
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of a random selection that all tasks have in common; 0.5 by default."),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Requests under way at a time.")] = 8,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch, in every arm; as many as clients by default.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests an arm and run.")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a random prompt.")] = 96,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 32,
    dtype: str = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Four tasks in one batch, beside one task alone and a swap for every request; random tasks of any checkpoint.

    Says, beside what each arm took, what memory and disk allow it: the experts and bytes that its decode steps touch.
    """
    from benchmarks.mixed import bench_mixed
    from benchmarks.mixed_tasks import Work
    from store.home import bundled_model

    work = Work(
        keep=keep,
        clients=clients,
        rows=rows,
        requests=requests,
        prompt_tokens=prompt,
        tokens=tokens,
        scorer=scorer,
        overlap=overlap,
        dtype=dtype,
        threads=threads,
    )
    arms, ratios = bench_mixed(model or bundled_model(), work, runs)
    shown = [asdict(arm) for arm in arms]
    table("mixed tasks", _columns(shown, SPEED))
    table("what a run took, and what a decode step touched", _columns(shown, PARTS))
    answer({"arms": shown, "ratios": ratios, "work": asdict(work)}, as_json)


def _columns(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]
