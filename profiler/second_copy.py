"""The whole model loaded once more by plain transformers, for gradients: what that takes, and when it can't be had.

Whoever used the copy asks `engine.checkpoint.check()` before its numbers count: it was loaded by the files' paths.
"""

from __future__ import annotations

from engine.engine import Engine
from store.errors import BudgetError, UnsupportedFamily
from store.sizes import show_bytes


def announce_copy(engine: Engine, who: str, instead: str) -> str:
    """What will be loaded for `who`, to be said before it is. `instead` is what needs no gradients.

    Raises UnsupportedFamily for a quantised checkpoint, BudgetError where the budget does not hold the copy beside all
    that the engine holds.
    """
    if engine.checkpoint.config.get("quantization_config"):
        raise UnsupportedFamily(
            f"{who} takes gradients, for which weights have to be plain numbers, and this checkpoint is quantised. Use "
            f"its bfloat16 version, or choose {instead}."
        )
    plan = engine.plan
    size = plan.dense_bytes + plan.layers * plan.experts * plan.slot_bytes
    if plan.budget is not None and size + plan.total_bytes > plan.budget:
        raise BudgetError(
            f"{who} takes gradients through a second copy of the whole model, {show_bytes(size)} and activations, "
            f"beside the engine's {show_bytes(plan.total_bytes)}; the budget is {show_bytes(plan.budget)}. Give "
            f"--memory of both together or none, or choose {instead}."
        )
    return f"{who} takes gradients: a second copy of the model ({show_bytes(size)}) is loaded whole, beside the engine."
