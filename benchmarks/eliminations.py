"""Why NAEE was behind at an eighth of the experts: each guess as a way of its own, on the demo's test items.

A way says which tokens are looked at, how a token's error counts, whether experts that were dropped may come back, and
whether a layer sees what the layers below it give once they are cut. Plain and slow: `profiler/elimination.py` is the
fast form of the first way. m tokens, E experts, K = top_k, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from demo.prepare import DTYPE, THREADS, corpus
from engine.config import EngineConfig
from engine.engine import Engine
from profiler.allocation import kept
from profiler.batches import Encoded, cut, encode_corpus, pad
from profiler.evaluate import judged_role
from profiler.forced import evaluate_forced
from profiler.progress import Progress, Report
from profiler.sample import RouterSample, combine
from profiler.statistics import RESPONSE
from store.home import bundled_model
from store.records import Selection

ROWS = 50
KEEP = 0.125

Error = Callable[[Tensor, Tensor], Tensor]  # outputs and targets f64 [m, H] -> f64 [m]

ERRORS: Mapping[str, Error] = {
    "squares": lambda y, target: (y - target).square().sum(1),
    "norms": lambda y, target: (y - target).norm(dim=1),
    "shares": lambda y, target: (y - target).square().sum(1) / target.square().sum(1).clamp(min=1e-12),
}


@dataclass(frozen=True, slots=True)
class Way:
    """`tokens` None: all. `swaps`: experts are exchanged as long as that helps. `below`: layers below are cut first."""

    tokens: int | None = 256
    answers: bool = False
    error: str = "squares"
    swaps: bool = False
    below: bool = False

    @property
    def name(self) -> str:
        text = f"{self.tokens or 'all'} tokens{' of answers' if self.answers else ''}, {self.error}"
        return text + (", swaps" if self.swaps else "") + (", layers below cut" if self.below else "")


WAYS = (
    Way(),
    Way(1024),
    Way(None),
    Way(None, error="norms"),
    Way(swaps=True),
    Way(None, below=True),
    Way(answers=True),
    Way(None, answers=True),
    Way(None, answers=True, error="norms"),
    Way(None, answers=True, error="shares"),
    Way(answers=True, swaps=True),
    Way(None, answers=True, below=True),
)


@dataclass(frozen=True, slots=True)
class EliminationRow:
    way: str
    task: str
    tokens: int
    accuracy: float
    nll: float
    items: int


@torch.inference_mode()
def bench_eliminations(tasks: Sequence[str], items: int, report: Report) -> list[EliminationRow]:
    """Every way at an eighth of the experts, the same number in each layer."""
    rows: list[EliminationRow] = []
    config = EngineConfig(bundled_model(), max_context=256, max_batch=ROWS, dtype=DTYPE, threads=THREADS)
    with Engine.open(config) as engine:
        for task, way in product(tasks, WAYS):
            report(Progress(f"{task}, {way.name}", "evaluate", len(rows), len(tasks) * len(WAYS)))
            text, test = (encode_corpus(engine, corpus(task, *which)) for which in (("calibration",), ("test", items)))
            selection, tokens = choose(engine, text, way, KEEP)
            found = evaluate_forced(engine, test, selection, ROWS, judged_role(test))
            rows.append(EliminationRow(way.name, task, tokens, found.accuracy or 0.0, found.nll, found.items))
    return rows


def choose(engine: Engine, text: Sequence[Encoded], way: Way, keep: float) -> tuple[Selection, int]:
    """The way's selection, and how many tokens it looked at."""
    card, tokens = engine.card, 0
    chosen: list[tuple[int, ...]] = []
    states = look(engine, text, way, None)
    for layer in range(card.layers):
        if way.below and layer:
            rest = Selection.whole(card.layers - layer, card.experts).experts
            states = look(engine, text, way, Selection((*chosen, *rest)))
        tried = Tried(engine, layer, states[layer], ERRORS[way.error])
        left = tried.drop(kept(card.experts, keep, card.top_k))
        chosen.append(tuple(sorted(tried.exchange(left) if way.swaps else left)))
        tokens = len(states[layer][0])
    return Selection(tuple(chosen)), tokens


class Tried:
    """One layer, its tokens and the error of what it gives them, tried with fewer experts."""

    def __init__(self, engine: Engine, layer: int, state: tuple[Tensor, ...], error: Error) -> None:
        self._engine, self._layer, self._error = engine, layer, error
        self._x, self._logits, weights, self._index = state
        self._outputs = engine.layers.expert_outputs(layer, self._x)  # [m, E, H]
        self._target = combine(self._outputs, weights, self._index.long())  # [m, H]

    def errors(self, tokens: Tensor, experts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """f64 [n] and index [n, K] of `tokens` i64 [n], when only `experts` are there."""
        x, logits = self._x[tokens], self._logits[tokens]
        weights, index = self._engine.layers.route_within(self._layer, x, logits, sorted(experts))
        return self._error(combine(self._outputs[tokens], weights, index.long()), self._target[tokens]), index.long()

    def lost(self, experts: Sequence[int]) -> float:
        return float(self.errors(torch.arange(len(self._x)), experts)[0].sum())

    def drop(self, count: int) -> list[int]:
        """Greedily, one at a time: the expert without whom least is lost, among equals the lower."""
        alive, index = list(range(self._outputs.shape[1])), self._index.long().clone()
        loss = torch.zeros(len(index), dtype=torch.float64)
        while len(alive) > count:
            costs = {}
            for expert in alive:
                hit = (index == expert).any(dim=1).nonzero().squeeze(1)  # [n]: no other token changes its experts
                again = (
                    self.errors(hit, [one for one in alive if one != expert]) if len(hit) else (loss[hit], index[hit])
                )
                costs[expert] = float(loss.sum() - loss[hit].sum() + again[0].sum()), hit, again
            worst = min(alive, key=lambda expert: (costs[expert][0], expert))
            _, hit, (loss[hit], index[hit]) = costs[worst]
            alive.remove(worst)
        return alive

    def exchange(self, alive: Sequence[int]) -> list[int]:
        """One expert for another, always the pair that helps most, until none does."""
        best, now = self.lost(alive), list(alive)
        while True:
            pairs = product(now, [one for one in range(self._outputs.shape[1]) if one not in now])
            tried = {pair: self.lost([*(one for one in now if one != pair[0]), pair[1]]) for pair in pairs}
            pair = min(tried, key=lambda each: tried[each])
            if tried[pair] >= best * (1 - 1e-9):
                return now
            best, now = tried[pair], [*(one for one in now if one != pair[0]), pair[1]]


def look(engine: Engine, text: Sequence[Encoded], way: Way, selection: Selection | None) -> list[tuple[Tensor, ...]]:
    """For each layer x [m, H], logits [m, E], weights [m, K] and index [m, K] of the way's tokens."""
    sample = RouterSample(engine.card.layers)
    for part in cut(engine, text, ROWS):
        batch = pad(part)
        sample.begin((batch.mask == 1) & ((batch.roles == RESPONSE) | (not way.answers)))
        engine.forward(batch.ids, batch.mask, [selection] * len(part), sample)
    return [sample.layer(layer, way.tokens) for layer in range(engine.card.layers)]
