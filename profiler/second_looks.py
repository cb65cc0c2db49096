"""The extras that no single pass gives: they try the model's experts or routers once more, after the sums are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.channels import gradients
from profiler.dropping import check_dropping, droppings
from profiler.elimination import answer_eliminations, eliminations
from profiler.enumeration import check_enumeration, enumerations
from profiler.extras import Needs
from profiler.relaxation import check_relaxation, relaxations
from profiler.unfinished import NOWHERE, Unfinished
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


def second_looks(
    engine: Engine, text: Sequence[Encoded], rows: int, needs: Needs, kept: Unfinished = NOWHERE
) -> dict[str, F64]:
    """Those of `needs` that are found by trying. `kept` holds what a killed run had finished of each."""
    ways: dict[str, Callable[[Unfinished], F64]] = {
        "elimination": lambda part: eliminations(engine, text, rows, kept=part),
        "answer_elimination": lambda part: answer_eliminations(engine, text, rows, part),
        "subset_losses": lambda part: enumerations(engine, text, rows, part),
        "dropping": lambda part: droppings(engine, text, rows, part),
        "relaxation": lambda part: relaxations(engine, text, part),
    }
    found = {name: look(kept.part(name)) for name, look in ways.items() if name in needs}
    return found | gradients.means(engine, text, rows, needs, kept)
