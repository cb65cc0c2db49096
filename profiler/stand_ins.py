"""Selections with and without stand-ins for the experts that they leave out, at equal bytes. Pure numpy.

What `store.stand_ins` makes of a profile's statistics, a device holds beside the experts: their bytes come out of the
same budget, so a selection with stand-ins keeps fewer experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from profiler.allocation import kept
from profiler.extras import NOTHING as NO_NEEDS
from profiler.extras import Needs
from profiler.statistics import Statistics
from store.errors import BudgetError, InvalidInput
from store.records import StandIn
from store.sizes import show_bytes
from store.stand_ins import KINDS, NOTHING, NOVICE, SUMS, novices


def choose(names: Sequence[str] | None = None) -> list[str]:
    """The named kinds, in the registry's order; `nothing` for None. Raises InvalidInput for an unknown name."""
    unknown = [name for name in names or () if name not in KINDS]
    if unknown:
        raise InvalidInput(
            f"There is no stand-in {unknown[0]!r}. Choose from: {', '.join(KINDS)}. Merged and recombined experts are "
            "packs: `moepager pack --way sub_moe` or `dern`.",
            param="stand_in",
        )
    return [kind for kind in KINDS if kind in (names or (NOTHING,))]


def needs_of(kinds: Iterable[str]) -> Needs:
    """The extras that have to be collected for these."""
    return frozenset({SUMS}) if NOVICE in kinds else NO_NEEDS


def pay(
    kind: str, budget: float | int, statistics: Statistics, expert_bytes: Sequence[int], profile: str
) -> tuple[float | int, StandIn | None]:
    """What is left of a budget (a share, or bytes) for experts, and the vectors that the rest is paid for.

    Raises BudgetError where what is left does not hold one token's experts, InvalidInput for a profile without the
    sums.
    """
    if kind == NOTHING:
        return budget, None
    top_k, layer = statistics.top_k, sum(expert_bytes)
    size = budget if isinstance(budget, int) else kept(statistics.experts, budget, top_k) * layer
    stand_in = novices(profile, statistics.arrays)
    left = size - stand_in.nbytes
    if left < top_k * layer:
        raise BudgetError(
            f"Stand-ins take {show_bytes(stand_in.nbytes)} of {show_bytes(size)}; what is left does not hold {top_k} "
            "experts, what one token needs, in each layer. Keep more, or let nothing stand in."
        )
    return left, stand_in
