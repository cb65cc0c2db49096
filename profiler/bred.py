"""Selections of a profile that were searched for, size by size, among what its scorers chose and their children."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.evaluate import Measured
from profiler.evidence import HeldOut, put_evaluations
from profiler.evolution import ALLOCATOR, NAME, VERSION, Room, evolve, start_above
from profiler.forced import evaluate_forced
from profiler.progress import Progress, Report
from profiler.scorers.registry import BASELINES
from store.database import Store
from store.errors import NotFound
from store.records import Profile, Selection, StoredSelection
from store.stand_ins import NOTHING

ITEMS = 48  # of the calibration text, on which fitness is measured: the source searches on a training set too


def put_evolved(
    engine: Engine,
    store: Store,
    profile: Profile,
    text: Sequence[Encoded],
    evaluations: int,
    held_out: HeldOut | None,
    report: Report,
) -> None:
    """One selection a size, the smallest size first: a larger one starts with what the smaller one found, too, and
    keeps it where nothing larger is fitter.

    Its evidence comes from the held-out items, as everybody's. What is stored already is not bred again.
    """
    judged = spread(text)

    def fitness(selection: Selection) -> Measured:
        return evaluate_forced(engine, judged, selection, engine.plan.max_batch)

    starts = _starts(store, profile, engine.card.layers * engine.card.experts)
    found: list[StoredSelection] = []
    for done, keep in enumerate(sorted(starts)):
        report(Progress(profile.task, "evaluate", done, len(starts)))
        start = starts[keep]
        if found:
            start = start_above(found[-1].selection, start)
        name = f"{profile.id}-{NAME}.{VERSION}-{ALLOCATOR}-{keep:g}-{evaluations}"
        try:
            found.append(store.selections.get(name))
        except NotFound:
            best = evolve(start, room_for(engine, start), evaluations, fitness)
            found.append(StoredSelection(name, profile.id, NAME, ALLOCATOR, keep, best))
            store.selections.put(found[-1])
    if held_out is not None:
        put_evaluations(engine, store, profile, found, held_out, report)


def room_for(engine: Engine, start: Sequence[Selection]) -> Room:
    """As many bytes as the largest of `start` takes: all were chosen for one size."""
    card, slot = engine.card, engine.plan.slot_bytes
    return Room(card.experts, card.top_k, [slot] * card.layers, max(len(one) for one in start) * slot)


def _starts(store: Store, profile: Profile, whole: int) -> dict[float, list[Selection]]:
    """What the profile's scorers chose, by size; all experts can't be bred any better."""
    starts: dict[float, list[Selection]] = {}
    for one in store.selections.find(profile.id):
        plain = one.stand_in == NOTHING and one.active == 1
        if one.scorer not in {*BASELINES, NAME} and plain and len(one.selection) < whole:
            starts.setdefault(one.keep, []).append(one.selection)
    return starts


def spread(text: Sequence[Encoded]) -> list[Encoded]:
    """The items on which fitness is measured, spread evenly over the text; the shortest first."""
    ordered = sorted(text, key=lambda one: one.number)
    count = min(ITEMS, len(ordered))
    picked = [ordered[at * len(ordered) // count] for at in range(count)]
    return sorted(picked, key=lambda one: (len(one.tokens), one.number))
