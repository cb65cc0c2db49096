"""Which scorers there are. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from profiler.channels.camera import Camera
from profiler.channels.heapr_unit import HeaprUnit
from profiler.extras import Needs
from profiler.scorers.act_logits import ActLogits
from profiler.scorers.answers import Answers
from profiler.scorers.base import Scorer
from profiler.scorers.channel_sums import ChannelSums
from profiler.scorers.diep import Diep
from profiler.scorers.ean import Ean
from profiler.scorers.easy_ep import EasyEp
from profiler.scorers.frequency import Frequency
from profiler.scorers.gate import Gate
from profiler.scorers.gate_norm import GateNorm
from profiler.scorers.man import Man, Msan
from profiler.scorers.mone import Mone
from profiler.scorers.naee import Naee
from profiler.scorers.naee_exact import NaeeExact
from profiler.scorers.peu import Peu
from profiler.scorers.random import Random
from profiler.scorers.reap import Reap
from profiler.scorers.router_growth import RouterGrowth
from profiler.scorers.stun import Stun
from profiler.scorers.tcess import Tcess
from profiler.scorers.tsep import Tsep
from profiler.scorers.uncurl import Uncurl
from profiler.statistics import Statistics
from store.errors import InvalidInput

_DEFAULTS: tuple[Scorer, ...] = (Tcess(), Peu(), Reap(), EasyEp(), Gate(), Frequency(), Random())
_OTHERS: tuple[Scorer, ...] = (
    GateNorm(),
    Answers(EasyEp()),
    Answers(Gate()),
    Answers(GateNorm()),
    Ean(),
    Man(),
    Msan(),
    ActLogits(),
    Mone("sum"),
    Mone("mean"),
    Stun("coactivation"),
    Stun("router"),
    Uncurl(),
    Naee(),
    Naee(answers=True),
    NaeeExact(),
    Tsep(),
    Diep(),
    RouterGrowth(),
    ChannelSums(Camera()),
    ChannelSums(HeaprUnit()),
)

SCORERS: dict[str, Scorer] = {scorer.name: scorer for scorer in (*_DEFAULTS, *_OTHERS)}
DEFAULTS: tuple[str, ...] = tuple(scorer.name for scorer in _DEFAULTS)
BASELINES: tuple[str, ...] = ("frequency", "random")


def choose(names: Sequence[str] | None = None) -> list[Scorer]:
    """The named scorers, in the registry's order; the defaults for None. Raises InvalidInput for an unknown name."""
    unknown = [name for name in names or () if name not in SCORERS]
    if unknown:
        raise InvalidInput(f"There is no scorer {unknown[0]!r}. Choose from: {', '.join(SCORERS)}.", param="scorer")
    wanted = DEFAULTS if names is None else names
    return [scorer for name, scorer in SCORERS.items() if name in wanted]


def needs_of(scorers: Iterable[Scorer]) -> Needs:
    """The extras that have to be collected for these."""
    return frozenset().union(*(scorer.needs for scorer in scorers))


def computable(statistics: Statistics) -> list[Scorer]:
    """The scorers that these statistics are enough for."""
    return [scorer for scorer in SCORERS.values() if statistics.has(scorer.needs)]


def versions(scorers: Iterable[Scorer] | None = None) -> dict[str, str]:
    """Scorer name to version, of all that there are by default: a profile's provenance."""
    return {scorer.name: scorer.version for scorer in (SCORERS.values() if scorers is None else scorers)}
