"""Which scorers there are. A new one is a file and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from profiler.scorers.base import Scorer
from profiler.scorers.easy_ep import EasyEp
from profiler.scorers.frequency import Frequency
from profiler.scorers.gate import Gate
from profiler.scorers.peu import Peu
from profiler.scorers.random import Random
from profiler.scorers.reap import Reap
from profiler.scorers.tcess import Tcess
from store.errors import InvalidInput

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer for scorer in (Tcess(), Peu(), Reap(), EasyEp(), Gate(), Frequency(), Random())
}


def choose(names: Sequence[str] | None = None) -> list[Scorer]:
    """The named scorers, in the registry's order; all of them for None. Raises InvalidInput for an unknown name."""
    unknown = [name for name in names or () if name not in SCORERS]
    if unknown:
        raise InvalidInput(f"There is no scorer {unknown[0]!r}. Choose from: {', '.join(SCORERS)}.", param="scorer")
    return [scorer for name, scorer in SCORERS.items() if names is None or name in names]


def versions() -> dict[str, str]:
    """Scorer name to version: part of a profile's provenance and of its id."""
    return {name: scorer.version for name, scorer in SCORERS.items()}
