"""The extras that no single pass gives: they try the model's experts or routers once more, after the sums are there."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.channels import gradients
from profiler.dropping import check_dropping, droppings
from profiler.elimination import answer_eliminations, eliminations
from profiler.enumeration import check_enumeration, enumerations
from profiler.extras import Needs
from profiler.relaxation import check_relaxation, relaxations
from store.records import F64


def announce(engine: Engine, needs: Needs) -> list[str]:
    """What will take the whole model in memory, to be said before it starts.

    Raises, before the pass, what any of `needs` can't be had for: InvalidInput for the model, BudgetError for memory.
    """
    if "subset_losses" in needs:
        check_enumeration(engine.card.experts)
    if "dropping" in needs:
        check_dropping(engine)
    said = [gradients.announce(engine, needs), check_relaxation(engine) if "relaxation" in needs else None]
    return [each for each in said if each is not None]


def second_looks(engine: Engine, text: Sequence[Encoded], rows: int, needs: Needs) -> dict[str, F64]:
    """Those of `needs` that are found by trying."""
    found = {}
    if "elimination" in needs:
        found["elimination"] = eliminations(engine, text, rows)
    if "answer_elimination" in needs:
        found["answer_elimination"] = answer_eliminations(engine, text, rows)
    if "subset_losses" in needs:
        found["subset_losses"] = enumerations(engine, text, rows)
    if "dropping" in needs:
        found["dropping"] = droppings(engine, text, rows)
    if "relaxation" in needs:
        found["relaxation"] = relaxations(engine, text)
    return found | gradients.means(engine, text, rows, needs)
