"""What serves a request: which stored selection, or exact mode. Pure choices over a catalogue read from the store.

The evidence rule lives here: modes mask and auto are only ever served from a selection with a stored evaluation, auto
only with a bound that rests on enough items of it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.guard import ALARM_RATE, Guard, draw_guard, items_needed
from engine.plan import MemoryPlan
from service.retrieval import Retrieval
from service.settings import ServedMode, UnknownTask
from store.errors import InvalidInput, MismatchError, NotFound
from store.fingerprint import Fingerprint
from store.records import GENERALIST, Evaluation, Mode, ModelRecord, Price, Profile, Selection, StoredSelection, Trust
from store.stand_ins import attach_all

if TYPE_CHECKING:
    from service.settings import Settings
    from store.database import Store

BASELINES = frozenset({"random", "frequency"})  # scorers kept for comparison; they serve only where they are asked for


@dataclass(frozen=True, slots=True)
class Candidate:
    """A selection that may serve, with its evidence: `newest` where that is of the text that was used last."""

    stored: StoredSelection
    evidence: Evaluation
    newest: bool = True


@dataclass(frozen=True, slots=True)
class ProfiledTask:
    """A task with a profile of the model that is served. Selections without evidence are not among the candidates.

    `doubts` are what the profiler said against the profile. They refuse nothing: evidence decides what is served, and
    whoever is served is told.
    """

    name: str
    description: str
    profile_id: str
    candidates: tuple[Candidate, ...]
    prices: tuple[Price, ...] = ()
    trust: Trust | None = None
    doubts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The one that a task was profiled for."""

    name: str
    differs: tuple[str, ...] = ()  # where its weights are the same: config, tokenizer

    @classmethod
    def beside(cls, other: ModelRecord, this: Fingerprint) -> OtherModel:
        if other.weights_hash != this.weights:
            return cls(other.name)
        parts = {"config": other.config_hash == this.config, "tokenizer": other.tokenizer_hash == this.tokenizer}
        return cls(other.name, tuple(part for part, same in parts.items() if not same))

    def __str__(self) -> str:
        return f"{self.name}{': the same weights with another ' if self.differs else ''}{' and '.join(self.differs)}"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every task that has a profile of one model, as read from the store at one moment."""

    model: str  # fingerprint
    tasks: Mapping[str, ProfiledTask]
    elsewhere: Mapping[str, OtherModel] = field(default_factory=dict)  # tasks that are profiled only for another model

    @classmethod
    def read(cls, store: Store, model: Fingerprint) -> Catalogue:
        others = [other for other in store.models.list() if other.fingerprint != model.whole]
        tasks, elsewhere = {}, {}
        for task in store.tasks.list():
            profile = store.profiles.latest(model.whole, task.name, proven=True)
            if profile is not None:
                tasks[task.name] = ProfiledTask(
                    task.name,
                    task.description,
                    profile.id,
                    read_candidates(store, profile),
                    tuple(store.prices.list(profile.id)),
                    profile.trust,
                    profile.doubts,
                )
            elif having := [other for other in others if store.profiles.latest(other.fingerprint, task.name)]:
                found = [OtherModel.beside(other, model) for other in having]
                elsewhere[task.name] = max(found, key=lambda one: bool(one.differs))
        return cls(model.whole, tasks, elsewhere)

    def only(self, tasks: Container[str]) -> Catalogue:
        """As if there were no other tasks."""
        there = {name: task for name, task in self.tasks.items() if name in tasks}
        return Catalogue(self.model, there, {name: other for name, other in self.elsewhere.items() if name in tasks})

    def why_orphaned(self) -> str | None:
        """Where tasks were profiled for these weights under another config or tokenizer: which, and the way out."""
        orphans = {task: other for task, other in sorted(self.elsewhere.items()) if other.differs}
        if not orphans:
            return None
        changed = " and ".join(sorted({part for other in orphans.values() for part in other.differs}))
        return (
            f"The model's {changed} changed since {', '.join(orphans)} were profiled, though its weights did not. A "
            "profile is of all of them, so these tasks are not served from theirs. Put the old files back, or profile "
            "the tasks again: POST /v1/jobs, or `moepager profile`."
        )

    def named(self, task: str) -> ProfiledTask:
        if task in self.elsewhere:
            raise MismatchError(
                f"Task {task!r} has a profile of another model ({self.elsewhere[task]}), none of this one "
                f"(fingerprint {self.model[:16]}). A profile belongs to one model: profile the task on this one, "
                f"`moepager profile --task {task} --calibration FILE --eval FILE`."
            )
        if task not in self.tasks:
            known = ", ".join(sorted(self.tasks)) or "none yet"
            raise NotFound(
                f"No task {task!r} has a profile of this model. Profiled tasks: {known}. "
                f"Name one of them, or profile it: `moepager profile --task {task} --calibration FILE --eval FILE`."
            )
        return self.tasks[task]

    @property
    def retrievable(self) -> tuple[str, ...]:
        """The tasks that a query can be matched to: a generalist serves what matches none."""
        return tuple(sorted(name for name in self.tasks if name != GENERALIST))


def read_candidates(store: Store, profile: Profile) -> tuple[Candidate, ...]:
    """One for each selection: of several evaluations that on the newest text counts, or else the one made last, not the
    one that flatters.

    What stands in for experts comes from the profile's statistics, once for all of its selections.
    """
    newest = store.evaluations.newest_text(profile.id)
    pairs = sorted(store.evaluations.list(profile.id), key=lambda pair: pair[1].evaluation_hash == newest)
    found = {stored.id: (stored, evidence) for stored, evidence in pairs}
    shared = attach_all([stored for stored, _ in found.values()], profile.statistics)
    made = [(stored, found[stored.id][1]) for stored in shared]
    return tuple(Candidate(stored, evidence, evidence.evaluation_hash == newest) for stored, evidence in made)


@dataclass(frozen=True, slots=True)
class Wish:
    """What a request asks for; None leaves it to the service."""

    task: str | None = None
    mode: Mode | None = None
    keep: float | None = None
    scorer: str | None = None
    alarm_rate: float | None = None  # of mode auto
    max_swap_ms: float | None = None
    active: float | None = None


@dataclass(frozen=True, slots=True)
class Policy:
    """What the settings say where the request is silent, and the memory plan that a selection has to fit."""

    plan: MemoryPlan
    unknown_task: UnknownTask = "exact"
    keep: float | None = None
    scorer: str | None = None
    mode: ServedMode = "mask"
    alarm_rate: float = ALARM_RATE
    active: float = 1.0

    @classmethod
    def of(cls, settings: Settings, plan: MemoryPlan) -> Policy:
        names = ("unknown_task", "keep", "scorer", "mode", "alarm_rate", "active")
        return cls(plan, **{name: getattr(settings, name) for name in names})


@dataclass(frozen=True, slots=True)
class Serving:
    """What will serve one request. `candidate` is None in exact mode; there is a `guard` in mode auto alone.

    `doubts` are those about the profile that serves.
    """

    retrieval: Retrieval
    mode: Mode
    served_task: str | None
    profile_id: str | None
    candidate: Candidate | None
    guard: Guard | None = None
    doubts: tuple[str, ...] = ()

    @property
    def selection(self) -> Selection | None:
        return self.candidate.stored.selection if self.candidate else None

    @property
    def keep(self) -> float:
        return self.candidate.stored.keep if self.candidate else 1.0

    @property
    def stand_in(self) -> str | None:
        return self.candidate.stored.stand_in if self.candidate else None

    @property
    def scorer(self) -> str | None:
        return self.candidate.stored.scorer if self.candidate else None

    @property
    def active(self) -> float:
        return self.candidate.stored.active if self.candidate else 1.0

    @property
    def calls(self) -> tuple[int, ...] | None:
        return self.selection.calls if self.selection else None


def choose_serving(wish: Wish, retrieval: Retrieval, catalogue: Catalogue, policy: Policy) -> Serving:
    """Mask or auto mode where a task is known; else what the policy says. Refuses what it can't do, never falls back.

    Mode auto leaves queries of no task to the policy as well: it promises what exact mode would say, or near it.
    """
    task = catalogue.named(retrieval.task) if retrieval.task is not None else None
    _refuse_alarm_rate(wish, wish.mode or policy.mode)
    if wish.mode == "exact":
        return _exact(wish, retrieval)
    if task is not None:
        return _mask(task, wish, retrieval, policy)
    if GENERALIST in catalogue.tasks and (policy.unknown_task == "generalist" or wish.mode == "mask"):
        return _mask(catalogue.named(GENERALIST), wish, retrieval, policy)
    if policy.unknown_task != "exact" or wish.mode == "mask":  # a key that is limited to tasks may have no generalist
        raise InvalidInput(_no_task(retrieval), param="task", code="no_matching_task")
    return _exact(wish, retrieval)


def _refuse_alarm_rate(wish: Wish, mode: Mode) -> None:
    if wish.alarm_rate is not None and mode != "auto":
        raise InvalidInput(
            f"`alarm_rate` ({wish.alarm_rate:g}) is that of the guard, and mode {mode} has none. Leave it out, or ask "
            "for mode auto.",
            param="alarm_rate",
        )


def _exact(wish: Wish, retrieval: Retrieval) -> Serving:
    for name, value in (("keep", wish.keep), ("scorer", wish.scorer), ("active", wish.active)):
        if value is not None:
            raise InvalidInput(
                f"`{name}` ({value}) sizes a selection, and exact mode uses none. Leave it out, or ask for mode mask.",
                param=name,
            )
    return Serving(retrieval, "exact", None, None, None)


def _mask(task: ProfiledTask, wish: Wish, retrieval: Retrieval, policy: Policy) -> Serving:
    keep = wish.keep if wish.keep is not None else policy.keep
    scorer = wish.scorer if wish.scorer is not None else policy.scorer
    candidate = choose_candidate(task, keep, scorer, policy, wish.active)
    mode = wish.mode or policy.mode
    alarm_rate = policy.alarm_rate if wish.alarm_rate is None else wish.alarm_rate
    guard = choose_guard(task, candidate, alarm_rate) if mode == "auto" else None
    return Serving(retrieval, mode, task.name, task.profile_id, candidate, guard, task.doubts)


def choose_guard(task: ProfiledTask, candidate: Candidate, alarm_rate: float) -> Guard:
    """The bound that the selection's evaluation draws. Refuses one that rests on too few items."""
    guard = draw_guard(candidate.evidence.levels, alarm_rate)
    if guard is None:
        raise InvalidInput(
            f"Mode auto needs a bound, and at an alarm rate of {alarm_rate:g} that takes {items_needed(alarm_rate)} "
            f"held-out items; the evaluation of task {task.name!r} at {candidate.stored.keep:g} of the experts metered "
            f"{len(candidate.evidence.levels)}. Evaluate it on more (`moepager profile --task {task.name} "
            "--calibration FILE --eval FILE`), raise `alarm_rate` (MOEPAGER_ALARM_RATE), or ask for mode mask or "
            "exact.",
            param="mode",
            code="no_bound",
        )
    return guard


def _no_task(retrieval: Retrieval) -> str:
    if retrieval.nearest is None:
        return "No task of this model has a profile with exemplars. Profile a task, or ask for mode exact."
    return (
        f"No task is near enough to the query: the nearest is {retrieval.nearest!r} with similarity "
        f"{retrieval.similarity:.3f}, the threshold is {retrieval.threshold:.3f}. "
        "Name the task in the request, or ask for mode exact."
    )


def choose_candidate(
    task: ProfiledTask, keep: float | None, scorer: str | None, policy: Policy, active: float | None = None
) -> Candidate:
    """The largest size with evidence that fits, and at that size the best evidence, among those that make the wanted
    share of a token's calls: all of them unless the request or the policy say otherwise.
    """
    if not task.candidates:
        raise InvalidInput(
            f"The profile {task.profile_id} of task {task.name!r} has no stored evaluation at any size, so mask mode "
            f"is refused. Evaluate it: `moepager profile --task {task.name} --calibration FILE --eval FILE`; "
            "or ask for mode exact.",
            param="mode",
            code="no_evidence",
        )
    share = policy.active if active is None else active
    allowed = _of_active(_of_scorer(task.candidates, scorer, task.name), share, task.name)
    allowed = _of_size(allowed, keep, task.name)
    for size in sorted(
        {c.stored.keep for c in allowed}, reverse=True
    ):  # a store may have hundreds: most are not looked at
        fitting = [c for c in allowed if c.stored.keep == size and policy.plan.fits(c.stored.selection)]
        if fitting:
            return min(fitting, key=_worse)
    smallest = min((c.stored.selection for c in allowed), key=len)
    policy.plan.require(smallest)
    raise AssertionError(f"none of {len(allowed)} selections fits, yet the plan takes the smallest")


def best_by_size(task: ProfiledTask, scorer: str | None, active: float = 1.0) -> tuple[Candidate, ...]:
    """The candidate with the best evidence at each size, the largest first, of one share of the calls; whether it fits
    is another question.
    """
    allowed = [c for c in task.candidates if _allowed(c, scorer) and c.stored.active == active]
    sizes = sorted({c.stored.keep for c in allowed}, reverse=True)
    return tuple(min((c for c in allowed if c.stored.keep == size), key=_worse) for size in sizes)


def _allowed(candidate: Candidate, scorer: str | None) -> bool:
    return candidate.stored.scorer == scorer if scorer else candidate.stored.scorer not in BASELINES


def _worse(candidate: Candidate) -> tuple[bool, float, float, str, str]:
    """Sorts better evidence first: higher accuracy, then lower NLL; names make ties the same everywhere.

    Figures of other items are no better or worse: what was measured on the newest text goes before what was not.
    """
    evidence = candidate.evidence
    accuracy = evidence.accuracy if evidence.accuracy is not None else -math.inf
    return not candidate.newest, -accuracy, evidence.nll, candidate.stored.scorer, candidate.stored.id


def _of_scorer(candidates: Sequence[Candidate], scorer: str | None, task: str) -> Sequence[Candidate]:
    found = [c for c in candidates if _allowed(c, scorer)]
    if not found:
        have = _listed(c.stored.scorer for c in candidates)
        wanted = f"scorer {scorer!r}" if scorer else "a scorer other than the baselines random and frequency"
        raise InvalidInput(
            f"Task {task!r} has no evaluated selection by {wanted}; it has: {have}. Name one of those.",
            param="scorer",
            code="no_evidence",
        )
    return found


def _of_active(candidates: Sequence[Candidate], active: float, task: str) -> Sequence[Candidate]:
    found = [c for c in candidates if c.stored.active == active]  # as it was profiled: a call each would cost a query
    found = found or [c for c in candidates if math.isclose(c.stored.active, active, rel_tol=1e-6)]
    if not found:
        have = _listed(f"{c.stored.active:g}" for c in candidates)
        raise InvalidInput(
            f"Task {task!r} has no evaluated selection that makes {active:g} of a token's calls of experts; it has: "
            f"{have}. Ask for one of those (`active`, MOEPAGER_ACTIVE), or evaluate it: `moepager profile --task "
            f"{task} --active {active:g} --calibration FILE --eval FILE`.",
            param="active",
            code="no_evidence",
        )
    return found


def _of_size(candidates: Sequence[Candidate], keep: float | None, task: str) -> Sequence[Candidate]:
    found = [c for c in candidates if keep is None or math.isclose(c.stored.keep, keep, rel_tol=1e-6)]
    if not found:
        have = _listed(f"{c.stored.keep:g}" for c in candidates)
        raise InvalidInput(
            f"Task {task!r} has no evaluated selection that keeps {keep:g} of the experts; it has: {have}. "
            "Ask for one of those, or evaluate that size.",
            param="keep",
            code="no_evidence",
        )
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
