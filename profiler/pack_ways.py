"""The ways to pack a model, by name: which statistics each needs, and its recipe at a size. For commands and benches.

A way keeps a share of what experts weigh: of every expert's channels (a channel scorer's name), or of the experts
(`experts`: the router is limited to them; `dern` and `sub_moe` mix them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.engine import Engine
from profiler.allocation import uniform
from profiler.batches import Encoded
from profiler.channels.base import per_token
from profiler.channels.registry import CHANNEL_SCORERS
from profiler.channels.widths import covered_by, equal_coverage
from profiler.extras import NOTHING, Needs
from profiler.pack_mixtures import ClusterMeans, Outputs, Recombined
from profiler.pack_recipes import FewerChannels, InStrips, Recipe, rounded
from profiler.sample import sample_routing
from profiler.scorers.registry import choose as choose_scorers
from profiler.statistics import Statistics
from store.errors import InvalidInput
from store.records import F64, Selection

EXPERTS, DERN, SUB_MOE = "experts", "dern", "sub_moe"
WAYS: tuple[str, ...] = (*CHANNEL_SCORERS, EXPERTS, DERN, SUB_MOE)


@dataclass(frozen=True, slots=True)
class Pack:
    """What is asked for: shares of every expert's channels and of the experts, and by which scorer experts stay."""

    way: str
    channels: float = 1.0
    experts: float = 1.0
    scorer: str = "gate"
    compensate: bool = False
    strips: int = 1

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise InvalidInput(f"There is no way to pack {self.way!r}. Choose from: {', '.join(WAYS)}.", param="way")
        if self.channels != 1 and self.way not in CHANNEL_SCORERS:
            raise InvalidInput(
                f"The way {self.way} keeps all channels of an expert. To keep a share of them, name a channel scorer: "
                f"{', '.join(CHANNEL_SCORERS)}.",
                param="channels",
            )
        for name in ("channels", "experts"):
            if not 0 < getattr(self, name) <= 1:
                raise InvalidInput(f"The share of {name} must lie in (0, 1], got {getattr(self, name)}.", param=name)
        if self.strips != 1 and (self.way not in CHANNEL_SCORERS or (self.channels, self.experts) != (1, 1)):
            raise InvalidInput(
                "Strips hold the whole model, in the order of a channel scorer: name one of "
                f"{', '.join(CHANNEL_SCORERS)}, and no share of channels or experts.",
                param="strips",
            )
        choose_scorers([self.scorer])

    @property
    def needs(self) -> Needs:
        """The statistics beyond those that every profile has."""
        scored = CHANNEL_SCORERS[self.way].needs if self.way in CHANNEL_SCORERS else NOTHING
        more = frozenset({"channel_sums"}) if self.compensate else NOTHING
        return scored | more | choose_scorers([self.scorer])[0].needs


def pack_of(way: str, keep: float, scorer: str = "gate") -> Pack:
    """The way at a share of the experts' bytes, by the one thing that it makes fewer."""
    return Pack(way, channels=keep, scorer=scorer) if way in CHANNEL_SCORERS else Pack(way, experts=keep, scorer=scorer)


def make_recipe(engine: Engine, statistics: Statistics, pack: Pack, text: Sequence[Encoded], rows: int) -> Recipe:
    """`text` is calibration text: `sub_moe` runs all experts on a sample of it."""
    card, width = engine.card, engine.layers.channels.width
    if pack.strips != 1:
        return _in_strips(engine, statistics, pack)
    scorer = choose_scorers([pack.scorer])[0]
    scores = scorer.score(statistics)
    selection = uniform(scores, pack.experts, card.top_k)
    kept = len(selection.experts[0])
    said: dict[str, Any] = {"way": pack.way, "scorer": f"{scorer.name}.{scorer.version}", "unseen": _unseen(statistics)}
    if pack.way == DERN:
        return Recombined(statistics.total("gates"), kept, width, said | {"scorer": "gates"})
    if pack.way == SUB_MOE:
        frequency = statistics.total("selected")
        return ClusterMeans(sampled_outputs(engine, text, rows), frequency, kept, width, said | {"scorer": "selected"})
    if pack.way == EXPERTS:
        return FewerChannels(_flat(statistics, width), width, selection, said=said)
    return _fewer_channels(statistics, pack, selection, rounded(width, pack.channels), said)


def _fewer_channels(
    statistics: Statistics, pack: Pack, selection: Selection, width: int, said: dict[str, Any]
) -> FewerChannels:
    scorer = CHANNEL_SCORERS[pack.way]
    scores = scorer.score(statistics)  # [L, E, F]
    means = per_token(statistics, "channel_sums") if pack.compensate else None
    told = {"channel_scorer": f"{scorer.name}.{scorer.version}", "compensated": pack.compensate}
    return FewerChannels(scores, width, selection, means, said | told | {"covered": coverage(scores, width)})


def _in_strips(engine: Engine, statistics: Statistics, pack: Pack) -> InStrips:
    scorer = CHANNEL_SCORERS[pack.way]
    said = {"way": pack.way, "channel_scorer": f"{scorer.name}.{scorer.version}", "unseen": _unseen(statistics)}
    return InStrips(scorer.score(statistics), pack.strips, engine.layers.share_of_strips(pack.strips), said)


def coverage(scores: F64, width: int) -> dict[str, float]:
    """The share of its score that the layer covered least keeps: `uniform` with one width for all experts, `free` with
    as many channels in all, spread over layers and experts so that this share is as high as it can be.
    """
    layers, experts, _ = scores.shape
    worth = np.maximum(scores, 0.0)
    whole = worth.sum(axis=(1, 2))  # [L]
    kept = np.sort(worth, axis=2)[:, :, ::-1][:, :, :width].sum(axis=(1, 2))  # [L]
    flat = worth.reshape(layers, -1)  # [L, E F]
    counts = equal_coverage(flat, layers * experts * width)  # [L]
    free = np.take_along_axis(covered_by(flat), counts[:, None], axis=1)  # [L, 1]
    share = np.divide(kept, whole, out=np.ones_like(kept), where=whole > 0)
    return {"uniform": float(share.min()), "free": float(free.min())}


def _flat(statistics: Statistics, width: int) -> F64:
    """Scores that nobody reads: all channels stay."""
    return np.zeros((statistics.layers, statistics.experts, width))


def _unseen(statistics: Statistics) -> int:
    """Experts that no token of the text was routed to: their channels are scored alike, and the first ones stay."""
    return int((statistics.total("selected") == 0).sum())


def sampled_outputs(engine: Engine, text: Sequence[Encoded], rows: int) -> Outputs:
    """Every expert's outputs on the same tokens of the text, of one layer after the other."""
    sample = sample_routing(engine, text, rows)
    return lambda layer: engine.layers.expert_outputs(layer, sample(layer)[0]).cpu()
