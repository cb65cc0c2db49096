"""What stands in for experts that a stored selection leaves out. The vectors lie in its profile's statistics.

`nothing`: the router is limited to the selection. `novice`: the router is free, and an expert that was left out gives
its mean output over the calibration text (MoNE, arXiv 2507.00390); one that the text never reached gives zeros, since
its mean is unknown. A profile's id pins model, text and statistics, so it names the vectors too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from store.errors import CorruptStore, InvalidInput
from store.records import F64, Selection, StandIn, StoredSelection

NOTHING, NOVICE = "nothing", "novice"
KINDS = (NOTHING, NOVICE)
SUMS = "output_sums"  # f64 [2, L, E, H], the sum of an expert's unweighted outputs

Arrays = Mapping[str, npt.NDArray[np.generic]]


def novices(profile: str, statistics: Arrays) -> StandIn:
    """Every expert's mean output. Raises InvalidInput for a profile without the sums, CorruptStore for broken ones."""
    if SUMS not in statistics:
        raise InvalidInput(
            f"Profile {profile} was made without the statistic {SUMS}, from which the mean outputs come that stand in "
            "for experts. Profile its text again with --stand-in novice.",
            param="stand_in",
        )
    sums = np.asarray(statistics[SUMS], np.float64).sum(axis=0)  # [L, E, H]
    seen = routed(statistics)[:, :, None]  # [L, E, 1]
    means = np.divide(sums, seen, out=np.zeros_like(sums), where=seen > 0)
    if not np.isfinite(means).all():
        raise CorruptStore(f"The mean outputs of profile {profile} are not finite. Profile the task again in float32.")
    return StandIn(f"{profile}-{NOVICE}", means.astype(np.float32))


def routed(statistics: Arrays) -> F64:
    """How many tokens each expert got (or a share of them), f64 [L, E]."""
    counts: F64 = np.asarray(statistics["selected"], np.float64).sum(axis=(0, 1))
    return counts


def unknown(selection: Selection, statistics: Arrays) -> int:
    """How many of the experts that are left out have no mean: no token of the text was routed to them."""
    silent = routed(statistics) == 0  # [L, E]
    return sum(int(row.sum()) - int(row[list(ids)].sum()) for row, ids in zip(silent, selection.experts, strict=True))


def attach(stored: StoredSelection, statistics: Arrays) -> StoredSelection:
    """The selection as it can be served: with its vectors, where it has any. The store keeps it without."""
    if stored.stand_in == NOTHING:
        return stored
    if stored.stand_in != NOVICE:
        raise CorruptStore(
            f"The selection {stored.id} has stand-ins of kind {stored.stand_in!r}; known are {', '.join(KINDS)}. "
            "Upgrade moepager, or profile its task again."
        )
    return _with(stored, novices(stored.profile, statistics))


def attach_all(stored: Sequence[StoredSelection], statistics: Arrays) -> list[StoredSelection]:
    """As `attach`, for selections of one profile, which share one set of vectors."""
    having = [one for one in stored if one.stand_in != NOTHING]
    shared = attach(having[0], statistics).selection.stand_in if having else None
    return [one if one.stand_in == NOTHING or shared is None else _with(one, shared) for one in stored]


def _with(stored: StoredSelection, vectors: StandIn) -> StoredSelection:
    return replace(stored, selection=replace(stored.selection, stand_in=vectors))
