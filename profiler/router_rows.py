"""What the router's weights alone say about experts: read from the checkpoint, no model built, no text run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from profiler.extras import Needs
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, InvalidInput, MismatchError
from store.expert_names import ROUTERS
from store.experts import ExpertMap
from store.records import F64
from store.shard import TensorSpan

WIDTHS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def router_rows(checkpoint: CheckpointMap) -> F64:
    """Every router's rows, f64 `[L, E, H]`. Raises CheckpointError for a router that is not one plain matrix,
    ShardChanged where files changed since they were mapped."""
    experts = ExpertMap.build(checkpoint)
    rows = np.stack([_read(_router(checkpoint, experts, owner)) for owner in experts.modules])
    checkpoint.check()
    return rows


def of_router(checkpoint: CheckpointMap, needs: Needs, base: Path | None) -> dict[str, F64]:
    """Those of `needs` that routers alone give. Raises InvalidInput without a base checkpoint where one is needed."""
    found: dict[str, F64] = {}
    if "router_growth" in needs:
        if base is None:
            raise InvalidInput(
                "The scorer router_growth compares the router with the one it was tuned from. "
                "Give that checkpoint's folder with --base.",
                param="base",
            )
        found["router_growth"] = growth(router_rows(checkpoint), router_rows(CheckpointMap.open(base)))
    if "router_distances" in needs:
        found["router_distances"] = np.stack([_distances(rows) for rows in router_rows(checkpoint)])
    return found


def growth(rows: F64, base: F64) -> F64:
    """How much longer each row is than the base's, f64 `[L, E]`."""
    if rows.shape != base.shape:
        raise MismatchError(
            f"The base's routers are {list(base.shape)} (layers, experts, width), this model's {list(rows.shape)}. "
            "Give the very checkpoint that this one was tuned from."
        )
    if np.array_equal(rows, base):
        raise InvalidInput(
            "The base's routers are the same as this model's, so tuning left them frozen and they rank nothing. "
            "Choose another scorer.",
            param="base",
        )
    change: F64 = np.linalg.norm(rows, axis=-1) - np.linalg.norm(base, axis=-1)
    return change


def _distances(rows: F64) -> F64:
    """`[E, H]` -> `[E, E]`, row by row: no `[E, E, H]` in memory."""
    return np.stack([np.linalg.norm(rows - row, axis=-1) for row in rows])


def _router(checkpoint: CheckpointMap, experts: ExpertMap, owner: str) -> TensorSpan:
    """The matrix with a row for each expert beside the experts of a layer."""
    block = owner.removesuffix(".experts") + "."
    found = [
        span
        for name, span in checkpoint.tensors.items()
        if name.startswith(block)
        and ROUTERS & set(name.removeprefix(block).split("."))
        and len(span.shape) == 2
        and span.shape[0] == experts.experts
    ]
    if len(found) != 1:
        names = ", ".join(span.name for span in found) or "none"
        raise CheckpointError(f"{block}* should hold one router of {experts.experts} rows, found: {names}.")
    return found[0]


def _read(span: TensorSpan) -> F64:
    with span.file.open("rb") as file:
        file.seek(span.offset)
        raw = file.read(span.nbytes)
    if span.dtype == "BF16":  # the upper half of a float32
        wide = np.frombuffer(raw, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).reshape(span.shape).astype(np.float64)
    if span.dtype not in WIDTHS:
        raise CheckpointError(f"The router {span.name} is stored as {span.dtype}; wanted BF16 or {', '.join(WIDTHS)}.")
    return np.frombuffer(raw, WIDTHS[span.dtype]).reshape(span.shape).astype(np.float64)
