"""Selections of a profile and the evidence for each: what every scorer keeps at every size, and what then remains.

An evaluation that is stored already is not run again; the whole model is measured once for all scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from engine.engine import Engine
from profiler.allocation import UNIFORM, kept, select
from profiler.allocators import ALLOCATORS
from profiler.batches import Encoded
from profiler.evaluate import Measured, evaluate
from profiler.progress import Progress, Report
from profiler.scorers.base import Scorer
from profiler.stand_ins import pay
from profiler.statistics import Statistics
from store.database import Store
from store.errors import BudgetError, InvalidInput
from store.records import Evaluation, Profile, Selection, StoredSelection
from store.sizes import show_bytes
from store.stand_ins import NOTHING

KEEPS = (1.0, 0.5, 0.25, 0.125)

Size = float | int  # a share of the experts, or bytes of them


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Evaluation items as tokens, the hash that names them, and how many of them run at once."""

    items: Sequence[Encoded]
    content_hash: str
    rows: int


def check_sizes(engine: Engine, keeps: Sequence[float], budgets: Sequence[int] = ()) -> tuple[Size, ...]:
    """Shares of the experts and bytes of them, the largest first, each once.

    Raises InvalidInput for a wrong one, BudgetError for one too large or too small.
    """
    if not keeps and not budgets:
        raise InvalidInput("Give at least one share of experts to keep, such as 0.5, or bytes.", param="keep")
    card, plan = engine.card, engine.plan
    for keep in keeps:
        count = kept(card.experts, keep, card.least)
        sample = Selection.of([range(count)] * card.layers)
        if count < card.experts and not plan.fits(sample):
            raise BudgetError(
                f"Keeping {keep:g} of the experts takes {len(sample)} slots ({count} in each of {card.layers} layers), "
                f"the budget gives {plan.slots}. Raise --memory, or leave that --keep out."
            )
    floor = card.layers * card.least * plan.slot_bytes
    for size in budgets:
        if not floor <= size <= plan.slots * plan.slot_bytes:
            raise BudgetError(
                f"Keeping {show_bytes(size)} of experts was asked for; {card.least} experts, what one token needs, in "
                f"each of {card.layers} layers take {show_bytes(floor)}, and the memory budget has "
                f"{show_bytes(plan.slots * plan.slot_bytes)} for experts. Ask for a size in between."
            )
    sizes = {share_of(engine, size): size for size in (*budgets, *map(float, keeps))}
    return tuple(sizes[share] for share in sorted(sizes, reverse=True))


def share_of(engine: Engine, size: Size) -> float:
    """A size as a share of all experts' bytes: a share is one already."""
    whole = engine.card.layers * engine.card.experts * engine.plan.slot_bytes
    return min(1.0, size / whole) if isinstance(size, int) else size


def put_selections(
    engine: Engine,
    store: Store,
    profile: Profile,
    scorers: Sequence[Scorer],
    budgets: Sequence[Size],
    allocators: Sequence[str] = (UNIFORM,),
    stand_ins: Sequence[str] = (NOTHING,),
) -> list[StoredSelection]:
    """Scores the profile and stores what each scorer and allocator keeps at each size."""
    stored = make_selections(engine, profile, scorers, budgets, allocators, stand_ins)
    for one in stored:
        store.selections.put(one)
    return stored


def make_selections(
    engine: Engine,
    profile: Profile,
    scorers: Sequence[Scorer],
    budgets: Sequence[Size],
    allocators: Sequence[str],
    stand_ins: Sequence[str] = (NOTHING,),
) -> list[StoredSelection]:
    """A slot is a slot in every layer, so all layers' experts cost the same bytes of the device.

    All experts need nothing that stands in for others.
    """
    statistics = Statistics.from_arrays(profile.statistics)
    sizes = [engine.plan.slot_bytes] * engine.card.layers
    made = []
    for scorer in scorers:
        for asked, allocator, kind in product(budgets, allocators, stand_ins):
            keep = share_of(engine, asked)
            if kind != NOTHING and keep == 1:
                continue
            budget, stand_in = pay(kind, asked, statistics, sizes, profile.id)
            selection = select(scorer, allocator, statistics, budget, sizes, engine.card.strips)
            size = f"{asked}B" if isinstance(asked, int) else f"{asked:g}"
            name = f"{profile.id}-{scorer.name}.{scorer.version}-{allocator}.{ALLOCATORS[allocator].version}-{size}"
            name += "" if kind == NOTHING else f"-{kind}"
            kept_here = replace(selection, stand_in=stand_in)
            made.append(StoredSelection(name, profile.id, scorer.name, allocator, keep, kept_here, kind))
    return made


def put_evaluations(
    engine: Engine,
    store: Store,
    profile: Profile,
    selections: Sequence[StoredSelection],
    held_out: HeldOut,
    report: Report,
) -> None:
    """Measures what has not been measured on these items yet, one selection after the other; equal ones once."""
    known = [
        (one, found)
        for one, found in store.evaluations.list(profile.id)
        if found.evaluation_hash == held_out.content_hash and found.levels  # else it was made before the guard
    ]
    ids = {one.id for one, _ in known}
    measured = {_served(one): found for one, found in known}
    missing = [one for one in selections if one.id not in ids]
    whole: Measured | None = None
    for done, stored in enumerate(missing):
        report(Progress(profile.task, "evaluate", done, len(missing)))
        if _served(stored) in measured:
            store.evaluations.put(replace(measured[_served(stored)], selection=stored.id))
            continue
        whole = whole or evaluate(engine, held_out.items, None, held_out.rows)
        every = len(stored.selection) == engine.card.layers * engine.card.experts
        complete = every and stored.selection.calls is None
        here = whole if complete else evaluate(engine, held_out.items, stored.selection, held_out.rows)
        measured[_served(stored)] = as_evaluation(stored, held_out, here, whole)
        store.evaluations.put(measured[_served(stored)])
    if missing:
        report(Progress(profile.task, "evaluate", len(missing), len(missing)))


def _served(stored: StoredSelection) -> tuple[object, ...]:
    """What two selections of a profile that serve alike have in common, read from the store or with their vectors."""
    return stored.stand_in, stored.selection.experts, stored.selection.calls


def as_evaluation(stored: StoredSelection, held_out: HeldOut, here: Measured, whole: Measured) -> Evaluation:
    return Evaluation(
        selection=stored.id,
        evaluation_hash=held_out.content_hash,
        items=here.items,
        accuracy=here.accuracy,
        full_accuracy=whole.accuracy,
        nll=here.nll,
        coverage=here.coverage,
        levels=here.levels,
    )
