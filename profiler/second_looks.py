"""The extras that no single pass gives: they try the model's experts or routers once more, after the sums are there."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.elimination import eliminations
from profiler.extras import Needs
from store.records import F64


def second_looks(engine: Engine, text: Sequence[Encoded], rows: int, needs: Needs) -> dict[str, F64]:
    """Those of `needs` that are found by trying."""
    found = {}
    if "elimination" in needs:
        found["elimination"] = eliminations(engine, text, rows)
    return found
