"""What a report says of a model, read from the store: numbers only. Knows no pictures and no HTML.

L MoE layers, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from profiler.allocation import UNIFORM, uniform
from profiler.scorers.gate import Gate
from profiler.scorers.registry import BASELINES, computable
from profiler.search import reasons_of
from profiler.stability import split_half_overlap
from profiler.statistics import Statistics
from store.database import Store
from store.errors import InvalidInput, NotFound
from store.intervals import wilson
from store.records import F64, Evaluation, ModelRecord, Price, Profile, Selection, StoredSelection
from store.stand_ins import NOTHING

PLAIN = UNIFORM  # the setting of a selection without anything special


@dataclass(frozen=True, slots=True)
class Measured:
    """One selection and what was measured inside it. `low` and `high` bound the accuracy with 95%."""

    selection: StoredSelection
    evaluation: Evaluation
    bytes: int | None  # of its experts in memory, where anybody told
    low: float | None
    high: float | None
    elsewhere: float | None  # accuracy on other tasks' items
    draws: int  # of the calibration text, behind the interval

    @property
    def setting(self) -> str:
        """How experts are given to the layers, and what stands in for those that are left out."""
        instead = self.selection.stand_in
        return self.selection.allocator if instead == NOTHING else f"{self.selection.allocator}, {instead} instead"

    @property
    def share(self) -> float:
        return self.selection.keep

    @property
    def accuracy(self) -> float:
        return self.evaluation.accuracy or 0.0


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task's youngest profile that has evidence, or else the youngest."""

    profile: Profile
    weight: F64  # [L, E] share of its layer's router weight that each expert carried; a layer adds up to 1
    chosen: Selection  # by router weight, at the report's share
    measured: tuple[Measured, ...]
    agreement: Mapping[str, float]  # of two halves of the text, by scorer, at the report's share
    reasons: tuple[str, ...]

    @property
    def task(self) -> str:
        return self.profile.task

    @property
    def knee(self) -> tuple[Measured, Measured] | None:
        """The last size, going down, that the evidence can't tell from the largest, and the first that it can, by the
        best selection of each but the baselines (UNCURL looks for this factor, arXiv 2409.01483); None: nothing breaks.
        """
        best: dict[float, Measured] = {}
        for one in self.measured:
            known = best.get(one.share)
            serves = one.selection.scorer not in BASELINES and one.selection.active == 1
            if one.evaluation.accuracy is not None and serves:
                best[one.share] = one if known is None or _order(one) < _order(known) else known
        down = [best[share] for share in sorted(best, reverse=True)]
        for above, below in pairwise(down):
            if below.accuracy < (down[0].low or 0.0):
                return above, below
        return None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """Every task of one model. `keep` is the share of experts at which tasks and halves are compared."""

    model: ModelRecord
    keep: float
    tasks: tuple[TaskReport, ...]

    def overlap(self) -> F64:
        """Jaccard's index of what each two tasks choose, `[tasks, tasks]`."""
        sets = [set(one.chosen) for one in self.tasks]
        return np.array([[len(a & b) / len(a | b) for b in sets] for a in sets])


def gather_report(store: Store, fingerprint: str, keep: float, only: Collection[str] = ()) -> ModelReport:
    """Raises NotFound for a model without profiles or a task that is not there, InvalidInput for an unusable share."""
    if not 0 < keep <= 1:
        raise InvalidInput(f"--keep is a share of the experts above 0, up to 1; got {keep:g}.", param="keep")
    model = store.models.get(fingerprint)
    names = sorted({profile.task for profile in store.profiles.list(fingerprint)})
    if not names:
        raise NotFound(f"The store has no profile of {model.name}. Profile a task first: moepager profile.")
    if strange := sorted(set(only) - set(names)):
        raise NotFound(f"{model.name} has no profile of task {strange[0]!r}; it has {', '.join(names)}.")
    chosen = [name for name in names if not only or name in only]
    profiles = [store.profiles.latest(fingerprint, name, proven=True) for name in chosen]
    return ModelReport(model, keep, tuple(_task(store, profile, keep) for profile in profiles if profile is not None))


def _task(store: Store, profile: Profile, keep: float) -> TaskReport:
    statistics = Statistics.from_arrays(profile.statistics)
    scores = Gate().score(statistics)  # [L, E]
    halves = {scorer.name: split_half_overlap(statistics, scorer, keep) for scorer in computable(statistics)}
    return TaskReport(
        profile=profile,
        weight=scores / scores.sum(axis=1, keepdims=True).clip(min=1e-30),
        chosen=uniform(scores, keep, statistics.top_k),
        measured=_measured(store, profile.id),
        agreement={name: share for name, share in halves.items() if share is not None},
        reasons=tuple(reasons_of(store, profile.id)),
    )


def _measured(store: Store, profile: str) -> tuple[Measured, ...]:
    prices: dict[tuple[str, str], Price] = {(one.selection, one.text): one for one in store.prices.list(profile)}
    found = []
    for selection, evaluation in store.evaluations.list(profile):
        own, others = prices.get((selection.id, "own")), prices.get((selection.id, "others"))
        low, high = _interval(evaluation, own)
        size, draws = (None, 0) if own is None else (own.bytes, len(own.draws))
        elsewhere = None if others is None else others.accuracy
        found.append(Measured(selection, evaluation, size, low, high, elsewhere, draws))
    return tuple(found)


def _order(one: Measured) -> tuple[float, float]:
    """Better evidence first, as the service chooses."""
    return -one.accuracy, one.evaluation.nll


def _interval(evaluation: Evaluation, price: Price | None) -> tuple[float | None, float | None]:
    """That of the price covers draws of the calibration text too; it speaks of the same items or not at all."""
    if price is not None and price.evaluation_hash == evaluation.evaluation_hash and price.low is not None:
        return price.low, price.high
    if evaluation.accuracy is None:
        return None, None
    return wilson(evaluation.accuracy, evaluation.items)


def curves(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    """By scorer, the smallest selection first."""
    found: dict[str, list[Measured]] = {}
    for one in sorted(measured, key=lambda one: one.share):
        found.setdefault(one.selection.scorer, []).append(one)
    return found
