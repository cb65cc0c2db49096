"""Task-specific expert pruning by windows, with frozen weights (after arXiv 2206.00277).

A window is one pass over the text, routed only among the experts that are alive. At its end those with the least router
weight are dropped for good, and the next window sees where their tokens went. No gradients: the source tunes between
windows, so this is its criterion and schedule without its training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.engine import Engine
from profiler.batches import Encoded, cut, pad
from profiler.channels.accumulator import make_accumulator
from profiler.extras import NOTHING
from profiler.unfinished import NOWHERE, Unfinished
from store.errors import BudgetError
from store.records import F64, Selection

# Of the mean share of those alive: who collects less goes. The source calls it beta and names no value; this is ours.
WEAK = 0.8
LEAST, MOST = 1 / 16, 1 / 4  # of those alive that go at the end of a window, whatever they collect


def droppings(engine: Engine, text: Sequence[Encoded], rows: int, kept: Unfinished = NOWHERE) -> F64:
    """f64 `[L, E]`, higher is dropped later: the number of the window, and within it the share of router weight.

    K experts a layer are never dropped; they stay to the end and are ordered by their last share. A killed run goes on
    with the window it was in.
    """
    card = engine.card
    everyone = np.ones((card.layers, card.experts), bool)
    state = kept.load() or {"alive": everyone, "found": np.zeros(everyone.shape), "window": np.asarray(0)}
    alive, found, window = state["alive"].astype(bool), state["found"].astype(np.float64), int(state["window"].item())
    while True:
        shares = _shares(engine, text, rows, alive)  # [L, E]
        found[alive] = window + shares[alive]
        if (alive.sum(axis=1) == card.top_k).all():
            return found
        for layer in range(card.layers):
            alive[layer, dropped(shares[layer], alive[layer], card.top_k)] = False
        window += 1
        kept.save({"alive": alive, "found": found, "window": np.asarray(window)})


def check_dropping(engine: Engine) -> None:
    """Raises BudgetError where not all experts fit at once: the windows begin with all of them alive."""
    card, plan = engine.card, engine.plan
    if plan.slots < card.layers * card.experts:
        raise BudgetError(
            f"tsep runs the text among ever fewer experts, at first all {card.layers * card.experts}; the budget has "
            f"room for {plan.slots}. Raise --memory, or leave that scorer out."
        )


def dropped(shares: F64, alive: np.ndarray[tuple[int], np.dtype[np.bool_]], floor: int) -> list[int]:
    """Who goes: shares below WEAK of the mean of the alive, but at least and at most the fractions above.

    `shares` f64 `[E]` sum to 1 over the alive.
    """
    ids = np.flatnonzero(alive)
    order = ids[np.lexsort((-ids, shares[ids]))]  # the weakest first; of equals the higher id goes
    weak = int((shares[ids] < WEAK / len(ids)).sum())
    count = min(max(weak, round(LEAST * len(ids)), 1), max(1, round(MOST * len(ids))), len(ids) - floor)
    return [int(expert) for expert in order[: max(count, 0)]]


def _shares(
    engine: Engine, text: Sequence[Encoded], rows: int, alive: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
) -> F64:
    """Router weight among the alive, as shares of each layer's sum."""
    kept = None if alive.all() else Selection.of([np.flatnonzero(row).tolist() for row in alive])
    accumulator = make_accumulator(engine, NOTHING)
    for part in cut(engine, text, rows):
        batch = pad(part)
        accumulator.begin(batch.roles, batch.halves)
        engine.forward(batch.ids, batch.mask, [kept] * len(part), accumulator)
    gates = accumulator.statistics().total("gates")  # [L, E]
    shares: F64 = gates / gates.sum(axis=1, keepdims=True)
    return shares
