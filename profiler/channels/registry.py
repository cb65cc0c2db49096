"""Which channel scorers there are. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from profiler.channels.base import ChannelScorer
from profiler.channels.camera import Camera
from profiler.channels.coverage import Coverage
from profiler.channels.heapr import Heapr
from profiler.channels.heapr_joint import HeaprJoint
from profiler.channels.heapr_unit import HeaprUnit
from profiler.channels.random import Random
from profiler.channels.router_wanda import RouterWanda
from profiler.channels.wifv import Wifv
from profiler.extras import Needs
from store.errors import InvalidInput

_ALL: tuple[ChannelScorer, ...] = (
    Camera(),
    Heapr(),
    Heapr(by_use=True),
    HeaprJoint(),
    HeaprUnit(),
    Coverage(),
    Wifv(),
    RouterWanda(),
    Random(),
)

CHANNEL_SCORERS: dict[str, ChannelScorer] = {scorer.name: scorer for scorer in _ALL}


def choose(names: Sequence[str] | None = None) -> list[ChannelScorer]:
    """The named ones, in the registry's order; all for None. Raises InvalidInput for an unknown name."""
    unknown = [name for name in names or () if name not in CHANNEL_SCORERS]
    if unknown:
        raise InvalidInput(
            f"There is no channel scorer {unknown[0]!r}. Choose from: {', '.join(CHANNEL_SCORERS)}.", param="scorer"
        )
    return [scorer for name, scorer in CHANNEL_SCORERS.items() if names is None or name in names]


def needs_of(scorers: Iterable[ChannelScorer]) -> Needs:
    """The extras that have to be collected for these."""
    return frozenset().union(*(scorer.needs for scorer in scorers))
