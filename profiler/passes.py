"""What a pass over a task's text is to collect and which profile that makes, and the pass itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.card import ModelCard
from engine.engine import Engine
from profiler.batches import Encoded, token_limit
from profiler.corpus import Corpus
from profiler.extras import EXTRAS, NOTHING, Needs, formulas
from profiler.gather import gather_statistics
from profiler.options import Options
from profiler.progress import Report
from profiler.router_rows import of_router
from profiler.run import Run
from profiler.second_looks import second_looks
from profiler.statistics import VERSION, Statistics
from profiler.stream import pays, stream_statistics
from profiler.unfinished import Unfinished
from store.checkpoint import CheckpointMap
from store.database import Store
from store.errors import NotFound
from store.records import F64, Profile


@dataclass(frozen=True, slots=True)
class Wanted:
    """A profile that is to be there, and `ready` if it is; `grown_from` one that has fewer statistics."""

    identity: str
    task: str
    needs: Needs
    static: Mapping[str, F64]  # extras that the routers alone say
    ready: Profile | None = None
    grown_from: Profile | None = None


def want(engine: Engine, store: Store, task: str, calibration: Corpus, options: Options) -> Wanted:
    """The profile of exactly this text that has what `options` need: the youngest that is stored, or a new one."""
    model, needs = engine.card.fingerprint, options.needs
    static = of_router(engine.checkpoint, needs, options.base)
    found = sorted(_profiles_of(store, model, task, calibration.content_hash, options.base), key=lambda p: p.created)
    if enough := [profile for profile in found if needs <= profile.statistics.keys()]:
        return Wanted(enough[-1].id, task, needs, static, enough[-1])
    if found:  # a profile may grow: what the youngest has, the new one has too
        needs |= found[-1].statistics.keys() & EXTRAS.keys()
        static = of_router(engine.checkpoint, needs, options.base)
    identity = profile_id(model, task, calibration.content_hash, needs, options.base)
    return Wanted(identity, task, needs, static, grown_from=found[-1] if found else None)


def collect(
    engine: Engine, text: Sequence[Encoded], name: str, wanted: Wanted, options: Options, report: Report
) -> Statistics:
    """The sums over `text`, by whichever pass pays; unfinished ones lie under `name`.

    They go on only where all is the same that the sums depend on: the cut, the precision, what is summed, and how.
    """
    stream = pays(engine, text, options.rows) if options.stream is None else options.stream
    run = Run(options.folder, name, ",".join((_plan(engine, wanted, options), "layers" if stream else "shards")))
    gathered = stream_statistics if stream else gather_statistics
    return gathered(engine, text, run, wanted.task, options.rows, report, wanted.needs)


def looked(engine: Engine, text: Sequence[Encoded], wanted: Wanted, options: Options) -> dict[str, F64]:
    """What is found by trying, each under the same conditions; unfinished ones lie beside the sums of the pass."""
    kept = Unfinished(options.folder, wanted.identity, _plan(engine, wanted, options))
    return second_looks(engine, text, options.rows, wanted.needs, kept)


def _plan(engine: Engine, wanted: Wanted, options: Options) -> str:
    sizes = (f"rows={min(options.rows, engine.plan.max_batch)}", f"tokens={token_limit(engine)}")
    return ",".join((*sizes, engine.plan.dtype, *formulas(wanted.needs)))


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


def lock_name(card: ModelCard, task: str) -> str:
    return digest(card.fingerprint, task)


def digest(*parts: str) -> str:
    return hashlib.sha256("\x1e".join(parts).encode()).hexdigest()[:16]


def _profiles_of(store: Store, model: str, task: str, calibration_hash: str, base: Path | None) -> list[Profile]:
    """All stored profiles of this text, whatever extras they have."""
    found = []
    for profile in store.profiles.list(model, task):
        needs = frozenset(profile.statistics.keys() & EXTRAS.keys())
        comparable = base is not None or "router_growth" not in needs
        if comparable and profile.id == profile_id(model, task, calibration_hash, needs, base):
            found.append(profile)
    return found
