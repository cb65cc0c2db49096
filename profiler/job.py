"""The offline job: calibration text -> statistics -> selections -> evidence -> store. Resumable and idempotent.

The store sees a profile only when its statistics are complete; selections and evaluations follow, one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime

from engine.embedder import Embedder
from engine.engine import Engine
from profiler.allocation import UNIFORM, choose_allocators
from profiler.batches import Encoded, encode_corpus
from profiler.bred import put_evolved
from profiler.calls import check_active, put_fewer_calls
from profiler.channels.weights import of_weights
from profiler.corpus import Corpus, refuse_overlap
from profiler.doubts import judged
from profiler.evidence import HeldOut, Size, check_sizes, make_selections, put_evaluations, put_selections
from profiler.options import DEFAULTS, Options
from profiler.parts import merged, run_of
from profiler.passes import Wanted, collect, lock_name, looked, want
from profiler.price import Pricing, put_prices
from profiler.progress import Report, ignore
from profiler.run import Run, hold
from profiler.scorers.base import Scorer
from profiler.scorers.registry import BASELINES, choose, computable, versions
from profiler.search import search
from profiler.second_looks import announce
from profiler.stand_ins import choose as choose_stand_ins
from profiler.statistics import Statistics
from store.catalogue import check_name
from store.database import Store
from store.errors import BudgetError, InvalidInput
from store.records import GENERALIST, Exemplar, ModelRecord, Profile, TaskRecord
from store.stand_ins import NOTHING as STAND_IN

log = logging.getLogger("moepager.profiler")


def profile_task(
    engine: Engine,
    store: Store,
    task: TaskRecord,
    calibration: Corpus,
    evaluation: Corpus | None,
    *,
    embedder: Embedder,
    others: Corpus | None = None,
    options: Options = DEFAULTS,
    report: Report = ignore,
) -> Profile:
    """Profiles one task, or finishes what an earlier run began; one that is done already runs no forward.

    `others` are items of other tasks, on which the selections that would serve are priced too.
    Everything that can be refused is refused before the first forward. Raises Conflict if another process holds the
    same task of the same model.
    """
    check_name(task.name)
    if task.name == GENERALIST:
        raise InvalidInput(f"The task name {GENERALIST!r} stands for all tasks together; choose another.", param="task")
    scorers, sizes = choose(options.scorers), check_sizes(engine, options.keeps, options.budgets)
    allocators = list(choose_allocators(options.allocators))
    check_stand_ins(engine, options)
    if options.evolve and engine.card.strips > 1:
        raise InvalidInput("Breeding moves experts, not strips of them: leave --evolve out.", param="evolve")
    if options.search and evaluation is None:
        raise InvalidInput("A search judges by held-out items: give --eval FILE.", param="eval")
    text, held_out = _encode(engine, calibration, evaluation, options.rows)
    check_active(engine, options.active, held_out)
    foreign = _encode(engine, calibration, others, options.rows)[1]
    exemplars = _embed(task.name, calibration, embedder, options.exemplars)
    with hold(options.folder, lock_name(engine.card, task.name)):
        profile = _put_gathered(engine, store, task, calibration, text, options, report)
        store.exemplars.replace(task.name, exemplars)
        put_evidence(engine, store, profile, (scorers, allocators, sizes), held_out, options, report)
        if options.evolve:
            put_evolved(engine, store, profile, text, options.evolve, held_out, report)
        if held_out is not None:
            put_fewer_calls(engine, store, profile, options.active, held_out, report)
            put_prices(engine, store, profile, held_out, Pricing(text, foreign, options), report)
    return profile


def gather_profile(
    engine: Engine, store: Store, task: TaskRecord, calibration: Corpus, options: Options, report: Report
) -> Profile:
    """The statistics that `options` need, stored: no selections, no evidence, and the task's exemplars as they were."""
    check_name(task.name)
    text = encode_corpus(engine, calibration)
    with hold(options.folder, lock_name(engine.card, task.name)):
        return _put_gathered(engine, store, task, calibration, text, options, report)


def check_stand_ins(engine: Engine, options: Options) -> None:
    """Raises InvalidInput for an unknown kind, BudgetError where they would be measured and have no memory."""
    if choose_stand_ins(options.stand_ins) != [STAND_IN] and not engine.plan.stand_ins:
        raise BudgetError("Selections with stand-ins can't be measured: open the engine with stand_ins of 1 or more.")


def put_evidence(
    engine: Engine,
    store: Store,
    profile: Profile,
    ways: tuple[Sequence[Scorer], Sequence[str], Sequence[Size]],
    held_out: HeldOut | None,
    options: Options,
    report: Report,
) -> None:
    """Selections by every scorer, allocator and size of `ways`, and what remains of the model inside them."""
    scorers, allocators, sizes = ways
    if options.search and held_out is not None:
        rivals = [scorer for scorer in scorers if scorer.name not in BASELINES]
        candidates = make_selections(engine, profile, rivals, sizes, allocators, options.stand_ins)
        candidates += make_selections(engine, profile, choose(BASELINES), sizes, [UNIFORM])
        search(engine, store, profile, candidates, held_out, report)
        return
    selections = put_selections(engine, store, profile, scorers, sizes, allocators, options.stand_ins)
    if held_out is not None:
        put_evaluations(engine, store, profile, selections, held_out, report)


def put_profile(
    store: Store, model: ModelRecord, task: TaskRecord, profile: Profile, grown_from: str | None = None
) -> None:
    """With what was made of the profile that it grew from. A task keeps its description where none is given."""
    store.models.put(model)
    if task.description or task.name not in {one.name for one in store.tasks.list()}:
        store.tasks.put(task)
    store.profiles.put(profile, grown_from=grown_from)


def model_record(engine: Engine, name: str | None) -> ModelRecord:
    card = engine.card
    return ModelRecord(
        fingerprint=card.fingerprint,
        name=name or card.folder.name,
        family=card.family,
        layers=card.layers,
        experts=card.experts,
        top_k=card.top_k,
        config_hash=card.hashes.config,
        weights_hash=card.hashes.weights,
        tokenizer_hash=card.hashes.tokenizer,
    )


def _encode(
    engine: Engine, calibration: Corpus, evaluation: Corpus | None, rows: int
) -> tuple[list[Encoded], HeldOut | None]:
    text = encode_corpus(engine, calibration)
    if evaluation is None:
        return text, None
    refuse_overlap(calibration, evaluation)
    return text, HeldOut(encode_corpus(engine, evaluation), evaluation.content_hash, rows)


def _put_gathered(
    engine: Engine,
    store: Store,
    task: TaskRecord,
    calibration: Corpus,
    text: Sequence[Encoded],
    options: Options,
    report: Report,
) -> Profile:
    """The stored profile of exactly this text that has what is needed, or a new one; what only served to make it goes.

    One that is there is judged, if nobody had done so.
    """
    wanted = want(engine, store, task.name, calibration, options)
    profile = wanted.ready or _gather(engine, store, wanted, calibration, text, options, report)
    profile = judged(profile)
    grown_from = None if wanted.grown_from is None else wanted.grown_from.id
    put_profile(store, model_record(engine, options.model_name), task, profile, grown_from)
    Run(options.folder, profile.id, plan="").forget()
    store.parts.forget(run_of(engine, profile.id))
    return profile


def _gather(
    engine: Engine,
    store: Store,
    wanted: Wanted,
    calibration: Corpus,
    text: Sequence[Encoded],
    options: Options,
    report: Report,
) -> Profile:
    """A new profile, which is not stored yet.

    What the one it grew from has summed up stays to the last bit, so that it chooses the same experts.
    """
    for said in announce(engine, wanted.needs):
        log.warning("%s", said)
    static = {**wanted.static, **of_weights(engine, wanted.needs)}
    statistics = merged(engine, store, wanted, options)
    if statistics is None:
        statistics = collect(engine, text, wanted.identity, wanted, options, report)
    statistics = statistics.with_extras(static)
    statistics = statistics.with_extras(looked(engine, text, wanted, options))
    if wanted.grown_from is not None:
        statistics = Statistics.from_arrays({**statistics.arrays, **wanted.grown_from.statistics})
    return Profile(
        id=wanted.identity,
        model=engine.card.fingerprint,
        task=wanted.task,
        statistics=statistics.arrays,
        tokens=int(statistics.token_count),
        calibration_hash=calibration.content_hash,
        calibration_items=calibration.item_hashes,
        scorers=versions(computable(statistics)),
        created=datetime.now(UTC),
    )


def _embed(task: str, calibration: Corpus, embedder: Embedder, limit: int) -> list[Exemplar]:
    """At most `limit` prompts, spread evenly over the text, as unit vectors."""
    prompts = list(dict.fromkeys(item.prompt for item in calibration.items))
    count = min(limit, len(prompts))
    picked = [prompts[i * len(prompts) // count] for i in range(count)]
    vectors = embedder.embed(picked)  # [n, d]
    return [Exemplar(task, text, vector, embedder.id) for text, vector in zip(picked, vectors, strict=True)]
