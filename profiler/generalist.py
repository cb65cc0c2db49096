"""The generalist: one profile of all tasks together, for queries that match none. Made of profiles, not of text."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from engine.engine import Engine
from profiler.allocation import choose_allocators
from profiler.batches import encode_corpus
from profiler.calls import check_active, put_fewer_calls
from profiler.corpus import Corpus
from profiler.doubts import judged
from profiler.evidence import HeldOut, check_sizes
from profiler.extras import Needs
from profiler.job import check_stand_ins, model_record, put_evidence, put_profile
from profiler.options import DEFAULTS, Options
from profiler.passes import digest, lock_name, profile_id, stored_profile
from profiler.price import Pricing, put_prices
from profiler.progress import Report, ignore
from profiler.run import hold
from profiler.scorers.registry import choose, computable, versions
from profiler.statistics import Statistics, balanced
from store.database import Store
from store.errors import InvalidInput, NotFound
from store.records import GENERALIST, Profile, TaskRecord


def profile_generalist(
    engine: Engine,
    store: Store,
    evaluation: Corpus | None,
    *,
    options: Options = DEFAULTS,
    report: Report = ignore,
) -> Profile:
    """The mean of the youngest profile of every task, each counting the same; evaluated on the pooled items given.

    Raises NotFound while no task is profiled, InvalidInput where evaluation items were any task's calibration.
    """
    scorers, sizes = choose(options.scorers), check_sizes(engine, options.keeps, options.budgets)
    allocators = list(choose_allocators(options.allocators))
    check_stand_ins(engine, options)
    parts = task_profiles(store, engine.card.fingerprint)
    _require(parts, options.needs)
    held_out: HeldOut | None = None
    if evaluation is not None:
        _refuse_seen(parts, evaluation)
        held_out = HeldOut(encode_corpus(engine, evaluation), evaluation.content_hash, options.rows)
    check_active(engine, options.active, held_out)
    with hold(options.folder, lock_name(engine.card, GENERALIST)):
        profile = _mean(store, engine.card.fingerprint, parts)
        task = TaskRecord(GENERALIST, f"The mean of {len(parts)} tasks: {', '.join(one.task for one in parts)}.")
        put_profile(store, model_record(engine, options.model_name), task, profile)
        put_evidence(engine, store, profile, (scorers, allocators, sizes), held_out, options, report)
        if held_out is not None:  # made of profiles, not of text, so there is nothing to draw anew
            put_fewer_calls(engine, store, profile, options.active, held_out, report)
            put_prices(engine, store, profile, held_out, Pricing([], None, replace(options, draws=0)), report)
    return profile


def task_profiles(store: Store, model: str) -> list[Profile]:
    """The youngest profile of every task but the generalist, by task. Raises NotFound if there is none."""
    youngest = {profile.task: profile for profile in store.profiles.list(model) if profile.task != GENERALIST}
    if not youngest:
        raise NotFound("No task of this model is profiled, so there is nothing to take the mean of. Profile one first.")
    return list(youngest.values())


def _mean(store: Store, model: str, parts: list[Profile]) -> Profile:
    calibration = digest(*(part.id for part in parts))
    identity = profile_id(model, GENERALIST, calibration)
    if (found := stored_profile(store, identity)) is not None:
        return judged(found, parts)
    mean = balanced([Statistics.from_arrays(part.statistics) for part in parts])
    made = Profile(
        id=identity,
        model=model,
        task=GENERALIST,
        statistics=mean.arrays,
        tokens=sum(part.tokens for part in parts),
        calibration_hash=calibration,
        calibration_items=frozenset().union(*(part.calibration_items for part in parts)),
        scorers=versions(computable(mean)),
        created=datetime.now(UTC),
    )
    return judged(made, parts)


def _require(parts: list[Profile], needs: Needs) -> None:
    for part in parts:
        if lacking := sorted(needs - part.statistics.keys()):
            raise InvalidInput(
                f"The profile of task {part.task!r} was made without the statistic {lacking[0]}. "
                "Profile the task again with the scorer that needs it, or leave that scorer out.",
                param="scorer",
            )


def _refuse_seen(parts: list[Profile], evaluation: Corpus) -> None:
    seen = {item: part.task for part in parts for item in part.calibration_items}
    shared = [item for item in evaluation.items if item.content_hash in seen]
    if shared:
        first = shared[0]
        raise InvalidInput(
            f"{len(shared)} of {len(evaluation.items)} evaluation items are calibration items of a task: "
            f"{first.prompt[:60]!r} was seen by {seen[first.content_hash]!r}. Remove them.",
            param="eval",
        )
