"""Which scorer and allocator serve a task best at a size, found on growing slices of its held-out items.

The finalists, and `frequency` and `random` beside them, are measured on all items and stored as evidence; why the best
of them was chosen is stored as a finished job of the task. The same text and candidates give the same choice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from engine.engine import Engine
from profiler.batches import Encoded
from profiler.evaluate import Measured, evaluate, judged_role
from profiler.evidence import HeldOut, as_evaluation
from profiler.halving import Outcome, halve, slices
from profiler.progress import Progress, Report
from profiler.scorers.registry import BASELINES
from store.database import Store
from store.errors import NotFound
from store.intervals import wilson
from store.records import Job, Profile, Selection, StoredSelection

PREFIX = "search"


def search(
    engine: Engine,
    store: Store,
    profile: Profile,
    candidates: Sequence[StoredSelection],
    held_out: HeldOut,
    report: Report,
) -> list[str]:
    """Searches each size, the largest first, and gives the reasons. What is searched already is not searched again."""
    reasons, sizes = [], sorted({one.keep for one in candidates}, reverse=True)
    whole: Measured | None = None
    role = judged_role(held_out.items)

    def measure(selection: Selection, part: Sequence[Encoded]) -> Measured:
        return evaluate(engine, part, selection, held_out.rows, role)

    for done, keep in enumerate(sizes):
        report(Progress(profile.task, "evaluate", done, len(sizes)))
        here = [one for one in candidates if one.keep == keep]
        identity = _identity(profile, here, held_out)
        try:
            reasons.append(store.jobs.get(identity).detail)
            continue
        except NotFound:
            whole = whole or evaluate(engine, held_out.items, None, held_out.rows)
        outcome = contest(here, held_out.items, measure)
        for stored, measured in outcome.ranking:
            store.selections.put(stored)
            store.evaluations.put(as_evaluation(stored, held_out, measured, whole))
        reasons.append(describe(keep, outcome))
        now = datetime.now(UTC)
        store.jobs.put(Job(identity, profile.model, profile.task, "done", 1.0, reasons[-1], now, now))
    report(Progress(profile.task, "evaluate", len(sizes), len(sizes)))
    return reasons


def reasons_of(store: Store, profile: str) -> list[str]:
    """Why this profile's selections were chosen, one a size that was searched; the youngest first."""
    return [job.detail for job in store.jobs.list() if job.id.startswith(f"{profile}-{PREFIX}-")]


def contest(
    candidates: Sequence[StoredSelection],
    items: Sequence[Encoded],
    measure: Callable[[Selection, Sequence[Encoded]], Measured],
) -> Outcome[StoredSelection]:
    """Successive halving over the items in an order as good as shuffled.

    Of rivals that chose equal sets of experts the first stands for all: no set fills the places of others.
    """
    always = [one for one in candidates if one.scorer in BASELINES]
    rivals = {one.selection: one for one in reversed(candidates) if one.scorer not in BASELINES}
    distinct = [one for one in candidates if one in always or rivals[one.selection] is one]
    order = sorted(items, key=lambda one: (one.item.content_hash, one.number))
    known: dict[tuple[Selection, int], Measured] = {}

    def once(stored: StoredSelection, start: int, end: int) -> Measured:
        key = stored.selection, start
        if key not in known:
            part = sorted(order[start:end], key=lambda one: (len(one.tokens), one.number))  # batches waste little
            known[key] = measure(stored.selection, part)
        return known[key]

    return halve(distinct, always, slices(len(order)), once)


def describe(keep: float, outcome: Outcome[StoredSelection]) -> str:
    """The choice, how sure it is, and what it had to beat."""
    rivals = [(stored, measured) for stored, measured in outcome.ranking if stored.scorer not in BASELINES]
    beaten = [(stored, measured) for stored, measured in outcome.ranking if stored.scorer in BASELINES]
    (best, measured), rounds = (rivals or beaten)[0], outcome.rounds
    against = "; ".join(f"{stored.scorer} {_shown(found)}" for stored, found in beaten if stored != best)
    tried = ", ".join(f"{count} candidates on {items} items" for items, count in rounds)
    return f"keep {keep:g}: {best.scorer} with {best.allocator}, {_shown(measured)}. Against {against}. {tried}."


def _shown(measured: Measured) -> str:
    if measured.accuracy is None:
        return f"nll {measured.nll:.3f}"
    low, high = wilson(measured.accuracy, measured.answered)
    return f"{measured.right} of {measured.answered} right ({low:.0%} to {high:.0%}), nll {measured.nll:.3f}"


def _identity(profile: Profile, candidates: Sequence[StoredSelection], held_out: HeldOut) -> str:
    """Of what was searched. It goes on to a profile that grows from this one, so no profile's id is in the hash."""
    names = sorted(one.id.removeprefix(profile.id) for one in candidates)
    parts = "\x1e".join([held_out.content_hash, *names])
    return f"{profile.id}-{PREFIX}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"
