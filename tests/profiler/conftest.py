"""Toy-4 and a random layer, fed to the real Accumulator the way the engine feeds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.accumulator import Accumulator
from profiler.extras import EXTRAS, NOTHING, Needs
from profiler.statistics import Statistics
from store.database import Store, open_store


@dataclass(frozen=True)
class Trace:
    """What one MoE layer did to T tokens."""

    h: Tensor  # [T, H]
    z: Tensor  # [T, E]
    weights: Tensor  # [T, K]
    index: Tensor  # [T, K]
    o: Tensor  # [T, E, H]

    def tokens(self, rows: Sequence[int]) -> Trace:
        pick = list(rows)
        return Trace(self.h[pick], self.z[pick], self.weights[pick], self.index[pick], self.o[pick])

    def permuted(self, order: Tensor) -> Trace:
        """Expert `order[i]` becomes expert i."""
        return replace(self, z=self.z[:, order], index=order.argsort()[self.index], o=self.o[:, order])

    @property
    def top_k(self) -> int:
        return self.index.shape[1]

    @property
    def experts(self) -> int:
        return self.z.shape[1]

    @property
    def dense_weights(self) -> Tensor:
        return torch.zeros_like(self.z).scatter(1, self.index, self.weights)  # [T, E]


def softmax_route(z: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    values, index = z.topk(top_k, dim=-1)
    return values.softmax(-1), index


def feed(accumulator: Accumulator, layer: int, trace: Trace, valid: Tensor) -> None:
    accumulator.residual(layer, trace.h)
    accumulator.routed(layer, trace.h, trace.z, trace.weights, trace.index, valid)
    tokens, slot = torch.ones_like(trace.index).nonzero(as_tuple=True)
    experts, weights = trace.index[tokens, slot], trace.weights[tokens, slot]
    outputs = trace.o[tokens, experts]
    accumulator.experts(layer, experts, tokens, weights, outputs)
    accumulator.combined(layer, torch.zeros_like(trace.h).index_add(0, tokens, weights[:, None] * outputs))


SUMMED = frozenset(name for name, extra in EXTRAS.items() if extra.summed)


def accumulate(
    traces: Sequence[Trace], rows: int = 1, padding: int = 0, half: int = 0, role: int = 0, needs: Needs = NOTHING
) -> Statistics:
    """The layers' statistics with the tokens dealt out to `rows` rows, each padded with `padding` tokens of rubbish."""
    count = len(traces[0].z)
    hidden = traces[0].h.shape[1]
    accumulator = Accumulator(len(traces), traces[0].experts, traces[0].top_k, needs=needs, hidden=hidden)
    for part in torch.arange(count).chunk(rows):
        valid = torch.tensor([True] * len(part) + [False] * padding)
        picked = [*part.tolist(), *[int(part[0])] * padding]
        roles = torch.full((1, len(picked)), role)
        accumulator.begin(roles, torch.tensor([half]))
        for layer, trace in enumerate(traces):
            here = trace.tokens(picked)
            feed(accumulator, layer, replace(here, o=torch.where(valid[:, None, None], here.o, torch.inf)), valid)
    return accumulator.statistics()


@pytest.fixture(name="accumulate")
def accumulate_fixture() -> Callable[..., Statistics]:
    return accumulate


@pytest.fixture
def toy() -> Trace:
    """Toy-4: four experts, two a token, four tokens; its scores under every method are known by hand."""
    z = torch.tensor([[3, 1, 0, -1], [2, 0, 1, -1], [0, 3, -1, 2], [-3, -0.5, -2, -4]], dtype=torch.float64)
    o = torch.zeros(4, 4, 2, dtype=torch.float64)
    o[:, 0] = torch.tensor([3.0, 4.0])
    o[:, 1] = torch.tensor([[0.0, 1.0], [0.0, 9.0], [0.0, 3.0], [0.0, 2.0]])
    o[:, 2] = torch.tensor([[6.0, 8.0]] * 3 + [[8.0, 6.0]])
    o[:, 3] = torch.tensor([0.0, 0.5])
    weights, index = softmax_route(z, 2)
    return Trace(torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64), z, weights, index, o)


@pytest.fixture
def toy_statistics(toy: Trace) -> Statistics:
    return accumulate([toy], needs=SUMMED)


@pytest.fixture
def summed() -> Needs:
    """Every extra that adds up over tokens."""
    return SUMMED


@pytest.fixture
def random_trace() -> Callable[..., Trace]:
    def make(seed: int, tokens: int = 40, experts: int = 8, top_k: int = 3, hidden: int = 5) -> Trace:
        draw = torch.Generator().manual_seed(seed)
        z = torch.randn(tokens, experts, generator=draw, dtype=torch.float64) * 2
        weights, index = softmax_route(z, top_k)
        o = torch.randn(tokens, experts, hidden, generator=draw, dtype=torch.float64)
        return Trace(torch.randn(tokens, hidden, generator=draw, dtype=torch.float64), z, weights, index, o)

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen2_moe", tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine.open(EngineConfig(model, max_context=128)) as opened:
        yield opened


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with open_store(f"sqlite:///{tmp_path}/store.db") as opened:
        yield opened
