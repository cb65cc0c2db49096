"""What a profile's selections cost: accuracy at each size with an interval, on its task's items and on others'.

Other calibration text of the task would have chosen other experts: bootstrap draws of it say how much that matters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from statistics import stdev

import numpy as np

from engine.engine import Engine
from profiler.allocation import needs_of_allocators, select
from profiler.batches import Encoded
from profiler.channels.weights import of_weights
from profiler.draws import draw
from profiler.evaluate import Measured
from profiler.evidence import HeldOut
from profiler.forced import evaluate_forced
from profiler.options import Options
from profiler.passes import Wanted, collect, digest, looked
from profiler.progress import Progress, Report, ignore
from profiler.router_rows import of_router
from profiler.run import Run
from profiler.scorers.registry import BASELINES, SCORERS, needs_of
from profiler.statistics import Statistics
from profiler.unfinished import Unfinished
from store.database import Store
from store.intervals import wilson
from store.records import F64, Evaluation, Price, Profile, Selection, StoredSelection
from store.stand_ins import NOTHING, SUMS, attach

# Student's t for 95%: what a standard deviation of so many draws less one is worth. Beyond: the normal one.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)

Measurement = tuple[float | None, float]  # accuracy, nll


@dataclass(frozen=True, slots=True)
class Pricing:
    """`text` is the calibration text, drawn anew as often as `options` say and summed up as they say; `others` are
    held-out items of other tasks.
    """

    text: Sequence[Encoded]
    others: HeldOut | None
    options: Options

    @property
    def draws(self) -> int:
        return self.options.draws


def put_prices(
    engine: Engine, store: Store, profile: Profile, held_out: HeldOut, pricing: Pricing, report: Report
) -> None:
    """Prices the best selection of each size, unless it is priced already for these items and as many draws."""
    known = {(one.selection, one.text, one.evaluation_hash): len(one.draws) for one in store.prices.list(profile.id)}
    best = best_by_size(store, profile, held_out)
    mine = [one for one in best if known.get((one[0].id, "own", held_out.content_hash), -1) < pricing.draws]
    whole = engine.card.layers * engine.card.experts
    # What was bred has no formula that a draw could be put into; all experts are all experts.
    redone = [one for one, _ in mine if len(one.selection) < whole and one.scorer in SCORERS]
    drawn = _drawn(engine, profile, redone, held_out, pricing, report)
    for stored, evidence in mine:
        store.prices.put(own_price(engine, stored, evidence, drawn.get(stored.id, ())))
    others = pricing.others
    if others is None:
        return
    full = None
    for stored, _ in best:
        if (stored.id, "others", others.content_hash) not in known:
            full = full or evaluate_forced(engine, others.items, None, others.rows)
            served = attach(stored, profile.statistics).selection
            here = evaluate_forced(engine, others.items, served, others.rows)
            store.prices.put(_others_price(engine, stored, others, here, full))


def best_by_size(store: Store, profile: Profile, held_out: HeldOut) -> list[tuple[StoredSelection, Evaluation]]:
    """What would serve at each size and share of the calls: of all but the baselines the best evidence on these items,
    the largest first.
    """
    found: dict[tuple[float, float], tuple[StoredSelection, Evaluation]] = {}
    for stored, evidence in store.evaluations.list(profile.id):
        if stored.scorer in BASELINES or evidence.evaluation_hash != held_out.content_hash:
            continue
        size = stored.keep, stored.active
        if size not in found or _worse(stored, evidence) < _worse(*found[size]):
            found[size] = stored, evidence
    return [found[size] for size in sorted(found, reverse=True)]


def own_price(engine: Engine, stored: StoredSelection, evidence: Evaluation, draws: Sequence[Measurement]) -> Price:
    low, high = interval(evidence.accuracy, evidence.items, [accuracy for accuracy, _ in draws])
    return Price(
        selection=stored.id,
        text="own",
        evaluation_hash=evidence.evaluation_hash,
        bytes=engine.plan.bytes_of(stored.selection),
        items=evidence.items,
        accuracy=evidence.accuracy,
        full_accuracy=evidence.full_accuracy,
        low=low,
        high=high,
        nll=evidence.nll,
        draws=tuple(draws),
    )


def interval(
    accuracy: float | None, items: int, draws: Sequence[float | None] = ()
) -> tuple[float | None, float | None]:
    """95% bounds of an accuracy: Wilson's over the items, widened by the spread of the draws; None without accuracy.

    The two are independent, so their half widths add as squares; the draws' is Student's t times their standard
    deviation.
    """
    if accuracy is None:
        return None, None
    low, high = wilson(accuracy, items)
    seen = [one for one in draws if one is not None]
    if len(seen) > 1:
        factor = T95[len(seen) - 2] if len(seen) - 2 < len(T95) else 1.96
        spread = factor * stdev(seen)
        low = max(0.0, accuracy - math.hypot(accuracy - low, spread))
        high = min(1.0, accuracy + math.hypot(high - accuracy, spread))
    return low, high


def _drawn(
    engine: Engine,
    profile: Profile,
    selections: Sequence[StoredSelection],
    held_out: HeldOut,
    pricing: Pricing,
    report: Report,
) -> Mapping[str, list[Measurement]]:
    """What each draw's own selection, by the same scorer and allocator at the same size, makes of the items. A killed
    run goes on with the draw it was in.
    """
    if not selections:
        return {}
    conditions = (held_out.content_hash, engine.plan.dtype, str(held_out.rows), *(one.id for one in selections))
    unfinished = Unfinished(pricing.options.folder, f"{profile.id}-drawn", digest(*conditions))
    before = unfinished.load()
    found = [] if before is None else list(before["found"])[: pricing.draws]  # [selections, 2] a draw
    for number in range(len(found) + 1, pricing.draws + 1):
        report(Progress(profile.task, "evaluate", number - 1, pricing.draws))
        found.append(_of_draw(engine, profile, selections, held_out, pricing, number))
        unfinished.save({"found": np.stack(found)})
    unfinished.forget()
    return {
        one.id: [(None if isnan(draw[place, 0]) else float(draw[place, 0]), float(draw[place, 1])) for draw in found]
        for place, one in enumerate(selections)
    }


def _of_draw(
    engine: Engine,
    profile: Profile,
    selections: Sequence[StoredSelection],
    held_out: HeldOut,
    pricing: Pricing,
    number: int,
) -> F64:
    """Accuracy (NaN where nothing was answered) and NLL of what one draw selects in place of each, [selections, 2]."""
    statistics = _statistics(engine, profile, selections, pricing, number)
    found = np.full((len(selections), 2), np.nan)
    for place, one in enumerate(selections):
        # A draw has mean outputs of its own: under the profile's id the device would give the profile's.
        kept = _reselect(engine, replace(one, profile=f"{one.profile}-draw{number}"), statistics)
        measured = evaluate_forced(engine, held_out.items, kept, held_out.rows)
        found[place] = np.nan if measured.accuracy is None else measured.accuracy, measured.nll
    return found


def _statistics(
    engine: Engine, profile: Profile, selections: Sequence[StoredSelection], pricing: Pricing, number: int
) -> Statistics:
    """Those of a draw, with what the selections' scorers and allocators need."""
    needs = needs_of(SCORERS[one.scorer] for one in selections)
    needs |= needs_of_allocators([one.allocator for one in selections])
    needs |= {SUMS for one in selections if one.stand_in != NOTHING}
    text, options = draw(pricing.text, number), pricing.options
    static = {**of_router(engine.checkpoint, needs, options.base), **of_weights(engine, needs)}
    wanted = Wanted(f"{profile.id}-draw{number}", profile.task, needs, static)
    found = collect(engine, text, wanted.identity, wanted, options, ignore)
    found = found.with_extras(static | looked(engine, text, wanted, options))
    Run(options.folder, wanted.identity, plan="").forget()
    return found


def _reselect(engine: Engine, one: StoredSelection, statistics: Statistics) -> Selection:
    """What the same scorer and allocator would keep in as many bytes; calls depend on no text."""
    sizes = [engine.plan.slot_bytes] * engine.card.layers
    size = len(one.selection) * engine.plan.slot_bytes
    kept = select(SCORERS[one.scorer], one.allocator, statistics, size, sizes, engine.card.strips)
    kept = replace(kept, calls=one.selection.calls)
    return attach(replace(one, selection=kept), statistics.arrays).selection


def _others_price(engine: Engine, stored: StoredSelection, others: HeldOut, here: Measured, full: Measured) -> Price:
    low, high = interval(here.accuracy, here.answered)
    return Price(
        selection=stored.id,
        text="others",
        evaluation_hash=others.content_hash,
        bytes=engine.plan.bytes_of(stored.selection),
        items=here.items,
        accuracy=here.accuracy,
        full_accuracy=full.accuracy,
        low=low,
        high=high,
        nll=here.nll,
    )


def _worse(stored: StoredSelection, evidence: Evaluation) -> tuple[float, float, str]:
    """As the service chooses: higher accuracy, then lower NLL."""
    return -(evidence.accuracy if evidence.accuracy is not None else 0.0), evidence.nll, stored.id
