"""What strips and quantised weights cost in time: decoding one row and eight, and cold paging, beside whole experts.

Packs of one model, of random weights as a rule, in several numbers of strips at equal bytes, and copies of some of them
in MXFP4: as many experts, in a quarter of the bytes. Two disjoint selections of each take
turns in a bank that holds just one. `whole`: all strips of some experts, so that a token goes through as many channels
in every pack and what differs is how finely they are cut. `spread`: strips drawn from all other experts, as tasks hold
them, so that reads are small and a token finds only some of its experts' channels. All arms take turns in every round;
ratios are taken inside a round.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.page_cache import evict
from engine.card import ModelCard
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import plan_memory
from engine.requests import GenerationRequest, Sampling, TokenEvent
from profiler.pack import write_pack
from profiler.pack_recipes import InStrips
from profiler.progress import ignore
from profiler.quantise import quantise_model
from store.errors import InvalidInput
from store.quantisation import MXFP4
from store.records import F64, Selection

WHOLE, SPREAD = "whole", "spread"
WIDE = "wide"  # experts as the model has them
PROMPT = 16  # tokens
ROWS = 8
MOST = 1 / 3  # of the experts: spread strips are drawn from those that the other selection leaves
WARM_UP = 1  # rounds
CHUNK = ROWS * PROMPT  # named, for with a budget it would be another, and the bank larger than asked


class Kind(NamedTuple):
    """A pack: into how many strips each expert is cut, and in which way weights are quantised, or WIDE."""

    strips: int
    way: str


@dataclass(frozen=True, slots=True)
class Terms:
    """`strips` begins with 1: what the others are compared with. `quantised`: those that are measured in `ways`,
    too."""

    model: Path
    strips: tuple[int, ...] = (1, 2, 4, 8)
    keep: float = 0.25
    tokens: int = 32
    rounds: int = 7
    threads: int = 1
    quantised: tuple[int, ...] = ()
    ways: tuple[str, ...] = (MXFP4,)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The one that others are compared with first."""
        return (
            *(Kind(count, WIDE) for count in self.strips),
            *(Kind(count, way) for count in self.quantised for way in self.ways),
        )

    def __post_init__(self) -> None:
        if self.strips[:1] != (1,):
            raise InvalidInput(f"Strips are compared with whole experts: begin with 1, got {self.strips}.")
        if not 0 < self.keep <= MOST:
            raise InvalidInput(f"--keep must be above 0 and at most a third; got {self.keep}.", param="keep")


@dataclass(frozen=True, slots=True)
class Figure:
    """The median over the rounds, and that of the ratio to whole experts in the same round with its range."""

    median: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """Tokens a second of one row and of eight together, seconds to page `bytes` cold, in the rounds of a run; and the
    same by the processor's time, which other work on the machine changes less."""

    strips: int
    way: str
    layout: str
    slot_bytes: int
    bytes: int
    one_row: Figure
    one_row_cpu: Figure
    eight_rows: Figure
    eight_rows_cpu: Figure
    paging_s: Figure
    paging_cpu_s: Figure


class _Sample(NamedTuple):
    """The figures of SpeedRow, of one round."""

    one_row: float
    one_row_cpu: float
    eight_rows: float
    eight_rows_cpu: float
    paging_s: float
    paging_cpu_s: float


_Arm = tuple[Kind, str]  # and the layout


def bench_strip_speed(terms: Terms, folder: Path | None = None) -> tuple[list[SpeedRow], tuple[float, float]]:
    """The rows, and the machine's load before and after. `folder` keeps the packs."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="moepager-strips-") as beside, ExitStack() as stack:
        models = {kind: _model(terms, kind, folder or Path(beside)) for kind in terms.kinds}
        engines = {kind: stack.enter_context(_open(model, terms)) for kind, model in models.items()}
        samples: dict[_Arm, list[_Sample]] = {(kind, at): [] for kind in terms.kinds for at in (WHOLE, SPREAD)}
        for round_ in range(-WARM_UP, terms.rounds):
            first = round_ % len(terms.kinds)
            for kind in terms.kinds[first:] + terms.kinds[:first]:
                for layout, selection in selections(engines[kind].card, terms.keep).items():
                    found = _measure(engines[kind], selection, terms)
                    if round_ >= 0:
                        samples[kind, layout].append(found)
        return [_row(arm, engines[arm[0]], samples, terms) for arm in samples], (load, os.getloadavg()[0])


def selections(card: ModelCard, keep: float, seed: int = 0) -> dict[str, Selection]:
    """The same experts, and strips of the same others, whatever the number of strips."""
    rng, strips = random.Random(seed), card.strips
    experts = card.experts // strips
    count = max(card.least, round(keep * experts))
    whole, spread = [], []
    for _ in range(card.layers):
        order = rng.sample(range(experts), experts)
        whole.append(_strips_of(order[:count], strips))
        others = _strips_of(order[count:], strips)
        firsts = others[::strips][: card.least]  # a layer serves with a strip of as many experts as a token has
        rest = random.Random(seed).sample(sorted({*others} - {*firsts}), count * strips - len(firsts))
        spread.append(firsts + rest)
    return {WHOLE: Selection.of(whole), SPREAD: Selection.of(spread)}


def _strips_of(experts: Sequence[int], strips: int) -> list[int]:
    return [expert * strips + strip for expert in experts for strip in range(strips)]


def _model(terms: Terms, kind: Kind, folder: Path) -> Path:
    """The pack, its channels in the order that they have: for speed one is as good as another."""
    if kind == (1, WIDE):
        return terms.model
    made = folder / f"{terms.model.name}-{kind.strips}{'' if kind.way == WIDE else f'-{kind.way}'}"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    if kind.way != WIDE:
        quantise_model(_model(terms, Kind(kind.strips, WIDE), folder), made, kind.way, lambda _: {}, ignore)
        return made
    with _open(terms.model, terms) as engine:
        scores = np.zeros((engine.card.layers, engine.card.experts, engine.layers.channels.width))
        share = engine.layers.share_of_strips(kind.strips)
        write_pack(engine, InStrips(scores, kind.strips, share), made, lambda _: {})
    return made


@contextmanager
def _open(model: Path, terms: Terms) -> Iterator[Engine]:
    """A bank that holds just one selection."""

    def config(memory: int | None) -> EngineConfig:
        context = PROMPT + terms.tokens
        return EngineConfig(
            model, memory, max_context=context, max_batch=ROWS, threads=terms.threads, chunk_tokens=CHUNK
        )

    card = ModelCard.read(model)
    size = len(selections(card, terms.keep)[WHOLE]) / (card.layers * card.experts)
    with Engine.open(config(plan_memory(card, config(None)).memory_for(size))) as engine:
        yield engine


def _measure(engine: Engine, selection: Selection, terms: Terms) -> _Sample:
    evict(engine.checkpoint.files)
    started = _now()
    with engine.lease(selection) as lease:
        paging = _now() - started
        if lease.experts_paged != len(selection):
            raise AssertionError(f"{lease.experts_paged} of {len(selection)} were paged: the bank was not cold")
        one, eight = (_rates(engine, selection, rows, terms.tokens) for rows in (1, ROWS))
        return _Sample(*one, *eight, *paging)


def _now() -> F64:
    """Seconds of the clock and of the processor, [2]."""
    return np.array([time.perf_counter(), time.process_time()])


def _rates(engine: Engine, selection: Selection, rows: int, tokens: int) -> F64:
    """Tokens a second of all rows together, from when the last of them has its first one, [2] as `_now`."""
    rng = random.Random(rows)
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [
        GenerationRequest(tuple(rng.randrange(256) for _ in range(PROMPT)), selection, "mask", sampling)
        for _ in range(rows)
    ]
    seen: list[tuple[int, F64]] = [
        (event.row, _now()) for event in engine.generate(requests) if isinstance(event, TokenEvent)
    ]
    begun = max(next(at for at, (row, _) in enumerate(seen) if row == each) for each in range(rows))
    rates: F64 = (len(seen) - 1 - begun) / (seen[-1][1] - seen[begun][1])
    return rates


def _row(arm: _Arm, engine: Engine, samples: dict[_Arm, list[_Sample]], terms: Terms) -> SpeedRow:
    mine, base = samples[arm], samples[terms.kinds[0], WHOLE]

    def figure(name: str) -> Figure:
        values = [getattr(each, name) for each in mine]
        ratios = [value / getattr(other, name) for value, other in zip(values, base, strict=True)]
        return Figure(median(values), median(ratios), min(ratios), max(ratios))

    slots = len(selections(engine.card, terms.keep)[WHOLE])
    slot = engine.plan.slot_bytes
    return SpeedRow(*arm[0], arm[1], slot, slots * slot, *map(figure, _Sample._fields))
