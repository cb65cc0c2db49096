"""The offline job: calibration text -> statistics -> selections -> evidence -> store. Resumable and idempotent.

The store sees a profile only when its statistics are complete; selections and evaluations follow, one by one.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from engine.card import ModelCard
from engine.embedder import Embedder
from engine.engine import Engine
from profiler.allocation import UNIFORM, choose_allocators, needs_of_allocators
from profiler.batches import Encoded, encode_corpus, token_limit
from profiler.bred import put_evolved
from profiler.channels.weights import of_weights
from profiler.corpus import Corpus, refuse_overlap
from profiler.doubts import judged
from profiler.evidence import KEEPS, HeldOut, Size, check_sizes, make_selections, put_evaluations, put_selections
from profiler.extras import EXTRAS, NOTHING, Needs, formulas
from profiler.gather import ROWS, gather_statistics
from profiler.price import Pricing, put_prices
from profiler.progress import Report, ignore
from profiler.router_rows import of_router
from profiler.run import Run, hold
from profiler.scorers.base import Scorer
from profiler.scorers.registry import BASELINES, choose, computable, needs_of, versions
from profiler.search import search
from profiler.second_looks import announce, second_looks
from profiler.stand_ins import choose as choose_stand_ins
from profiler.stand_ins import needs_of as needs_of_stand_ins
from profiler.statistics import VERSION
from profiler.stream import pays, stream_statistics
from store.catalogue import check_name
from store.checkpoint import CheckpointMap
from store.database import Store
from store.errors import BudgetError, InvalidInput, NotFound
from store.home import data_folder
from store.records import GENERALIST, Exemplar, ModelRecord, Profile, TaskRecord
from store.stand_ins import NOTHING as STAND_IN

log = logging.getLogger("moepager.profiler")

EXEMPLARS = 32


@dataclass(frozen=True, slots=True)
class Options:
    """How a job is run. `scorers` says which selections are made and measured, and which extras are collected.

    `base` is the checkpoint that the model was tuned from, for scorers that compare the two. `stream` runs the pass
    layer by layer; None: where the budget does not hold the whole model. `search` measures only a few items for most of
    the scorers and allocators, and all items for the best and the baselines. `budgets` are sizes in bytes beside the
    shares in `keeps`. `draws` is how often the text is drawn anew to see what other text would have chosen,
    `evolve` how many children of the selections are tried at each size.
    `stand_ins` are kinds of store/stand_ins.py, `extras` statistics that nothing of all this reads.
    """

    scorers: Sequence[str] | None = None
    allocators: Sequence[str] = (UNIFORM,)
    keeps: Sequence[float] = KEEPS
    budgets: Sequence[int] = ()
    stand_ins: Sequence[str] = (STAND_IN,)
    extras: Needs = NOTHING
    draws: int = 0
    evolve: int = 0
    exemplars: int = EXEMPLARS
    rows: int = ROWS
    runs: Path | None = None  # where unfinished runs lie; the data folder's `runs` by default
    model_name: str | None = None
    base: Path | None = None
    stream: bool | None = None
    search: bool = False

    @property
    def folder(self) -> Path:
        return self.runs or data_folder() / "runs"

    @property
    def needs(self) -> Needs:
        """The extras that its scorers, allocators and stand-ins read."""
        read = needs_of(choose(self.scorers)) | needs_of_allocators(self.allocators)
        return read | needs_of_stand_ins(self.stand_ins) | self.extras


DEFAULTS = Options()


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
    if options.search and evaluation is None:
        raise InvalidInput("A search judges by held-out items: give --eval FILE.", param="eval")
    text, held_out = _encode(engine, calibration, evaluation, options.rows)
    foreign = _encode(engine, calibration, others, options.rows)[1]
    exemplars = _embed(task.name, calibration, embedder, options.exemplars)
    with hold(options.folder, lock_name(engine.card, task.name)):
        profile = _gather(engine, store, task.name, calibration, text, options, report)
        put_profile(store, model_record(engine.card, options.model_name), task, profile)
        Run(options.folder, profile.id, plan="").forget()
        store.exemplars.replace(task.name, exemplars)
        put_evidence(engine, store, profile, (scorers, allocators, sizes), held_out, options, report)
        if options.evolve:
            put_evolved(engine, store, profile, text, options.evolve, held_out, report)
        if held_out is not None:
            pricing = Pricing(text, options.draws, foreign, options.folder, options.rows, options.base)
            put_prices(engine, store, profile, held_out, pricing, report)
    return profile


def gather_profile(
    engine: Engine, store: Store, task: TaskRecord, calibration: Corpus, options: Options, report: Report
) -> Profile:
    """The statistics that `options` need, stored: no selections, no evidence, and the task's exemplars as they were."""
    check_name(task.name)
    text = encode_corpus(engine, calibration)
    with hold(options.folder, lock_name(engine.card, task.name)):
        profile = _gather(engine, store, task.name, calibration, text, options, report)
        put_profile(store, model_record(engine.card, options.model_name), task, profile)
        Run(options.folder, profile.id, plan="").forget()
    return profile


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


def put_profile(store: Store, model: ModelRecord, task: TaskRecord, profile: Profile) -> None:
    store.models.put(model)
    store.tasks.put(task)
    store.profiles.put(profile)


def stored_profile(store: Store, identity: str) -> Profile | None:
    try:
        return store.profiles.get(identity)
    except NotFound:
        return None


def profile_id(model: str, task: str, calibration_hash: str, needs: Needs = NOTHING, base: Path | None = None) -> str:
    """Says what a profile was made from: the same text, model and statistics give the same profile.

    Scorers are no part of it, since they only read the statistics; a selection's id names its scorer's version.
    """
    tuned_from = ""
    if "router_growth" in needs:
        assert base is not None, "the job refuses without a base"
        tuned_from = CheckpointMap.open(base).fingerprint().whole
    return digest(model, task, calibration_hash, f"statistics={VERSION}", *formulas(needs), tuned_from)


def model_record(card: ModelCard, name: str | None) -> ModelRecord:
    parts = CheckpointMap.open(card.folder).fingerprint()
    return ModelRecord(
        fingerprint=card.fingerprint,
        name=name or card.folder.name,
        family=card.family,
        layers=card.layers,
        experts=card.experts,
        top_k=card.top_k,
        config_hash=parts.config,
        weights_hash=parts.weights,
        tokenizer_hash=parts.tokenizer,
    )


def lock_name(card: ModelCard, task: str) -> str:
    return digest(card.fingerprint, task)


def digest(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]


def _encode(
    engine: Engine, calibration: Corpus, evaluation: Corpus | None, rows: int
) -> tuple[list[Encoded], HeldOut | None]:
    text = encode_corpus(engine, calibration)
    if evaluation is None:
        return text, None
    refuse_overlap(calibration, evaluation)
    return text, HeldOut(encode_corpus(engine, evaluation), evaluation.content_hash, rows)


def _gather(
    engine: Engine,
    store: Store,
    task: str,
    calibration: Corpus,
    text: Sequence[Encoded],
    options: Options,
    report: Report,
) -> Profile:
    """The stored profile of exactly this text that has what is needed, or a new one, which is not stored yet."""
    model, needs = engine.card.fingerprint, options.needs
    static = of_router(engine.card.folder, needs, options.base)
    found = sorted(_profiles_of(store, model, task, calibration.content_hash, options.base), key=lambda p: p.created)
    if enough := [profile for profile in found if needs <= profile.statistics.keys()]:
        return judged(enough[-1])
    if found:  # a profile may grow: what the youngest has, the new one has too
        needs |= found[-1].statistics.keys() & EXTRAS.keys()
        static = of_router(engine.card.folder, needs, options.base)
    identity = profile_id(model, task, calibration.content_hash, needs, options.base)
    for said in announce(engine, needs):
        log.warning("%s", said)
    static |= of_weights(engine, needs)
    stream = pays(engine, text, options.rows) if options.stream is None else options.stream
    sizes = f"rows={min(options.rows, engine.plan.max_batch)},tokens={token_limit(engine)}"
    run = Run(options.folder, identity, plan=f"{sizes},{'layers' if stream else 'shards'}")
    collect = stream_statistics if stream else gather_statistics
    statistics = collect(engine, text, run, task, options.rows, report, needs).with_extras(static)
    statistics = statistics.with_extras(second_looks(engine, text, options.rows, needs))
    made = Profile(
        id=identity,
        model=model,
        task=task,
        statistics=statistics.arrays,
        tokens=int(statistics.token_count),
        calibration_hash=calibration.content_hash,
        calibration_items=calibration.item_hashes,
        scorers=versions(computable(statistics)),
        created=datetime.now(UTC),
    )
    return judged(made)


def _profiles_of(store: Store, model: str, task: str, calibration_hash: str, base: Path | None) -> list[Profile]:
    """All stored profiles of this text, whatever extras they have."""

    found = []
    for profile in store.profiles.list(model, task):
        needs = frozenset(profile.statistics.keys() & EXTRAS.keys())
        comparable = base is not None or "router_growth" not in needs
        if comparable and profile.id == profile_id(model, task, calibration_hash, needs, base):
            found.append(profile)
    return found


def _embed(task: str, calibration: Corpus, embedder: Embedder, limit: int) -> list[Exemplar]:
    """At most `limit` prompts, spread evenly over the text, as unit vectors."""
    prompts = list(dict.fromkeys(item.prompt for item in calibration.items))
    count = min(limit, len(prompts))
    picked = [prompts[i * len(prompts) // count] for i in range(count)]
    vectors = embedder.embed(picked)  # [n, d]
    return [Exemplar(task, text, vector, embedder.id) for text, vector in zip(picked, vectors, strict=True)]
