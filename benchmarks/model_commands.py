"""`moepager bench make-model` and `bench families`: models to measure with, and models that can be served."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.shown import AsJson, answer


def make_model_command(
    out: Annotated[Path, typer.Option(help="A new folder.")],
    shape: Annotated[str | None, typer.Option(help="olmoe-mini (1.8 GB) or olmoe (13.8 GB).")] = None,
    config: Annotated[Path | None, typer.Option(help="Or the shape of a published config.json.")] = None,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Write a random checkpoint in hub layout at real shapes, for speed only. It may be larger than memory."""
    from benchmarks.make_model import make_from_config, make_model
    from store.errors import InvalidInput

    if (shape is None) == (config is None):
        raise InvalidInput("Name either --shape or --config.", param="shape")
    written = make_model(shape or "", out, seed) if config is None else make_from_config(config, out, seed)
    answer({"path": str(out), "bytes": written}, as_json)


def families_command(
    family: Annotated[list[str] | None, typer.Option(help="Repeatable: a model_type; all if none.")] = None,
    out: Annotated[Path | None, typer.Option(help="Rewrite the tables of this page (docs/families.md).")] = None,
    as_json: AsJson = False,
) -> None:
    """Which architectures of transformers can be served: each rule on a tiny checkpoint, beside plain transformers."""
    from transformers.utils.logging import disable_progress_bar

    from benchmarks.families import bench_families, write_table
    from engine.tiny_config import moe_families
    from store.errors import InvalidInput

    if family and out:
        raise InvalidInput("--out needs all families: leave --family out.", param="out")
    unknown = sorted(set(family or ()) - moe_families().keys())
    if unknown:
        raise InvalidInput(
            f"transformers knows no MoE family {unknown[0]!r}; docs/families.md lists them.", param="family"
        )
    disable_progress_bar()
    rows = []
    for row in bench_families(family or ()):
        rows.append(row)
        print(row.line)
    if out is not None:
        write_table(rows, out)
    answer({"rows": [asdict(row) for row in rows]}, as_json)
