"""What an engine's passes take and touch: processor time of decoding and of prompts, the experts of a decode step.

A decode step is a pass of one column: a token of every row that runs. T tokens of a pass, k experts a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.plain_memory import dense_bytes
from engine.card import ITEMSIZE
from engine.engine import Engine
from engine.kvcache import KvCache
from engine.routing import Routing

Around = Callable[[Tensor, Routing], AbstractContextManager[None]]


@contextmanager
def around_steps(engine: Engine, around: Around) -> Iterator[None]:
    """Within the block `around(ids, routing)` is entered for every pass of the engine's batches, `ids` i64 [B, new]."""
    step = engine.passes.step

    def surrounded(ids: Tensor, mask: Tensor, cache: KvCache, routing: Routing) -> Tensor:
        with around(ids, routing):
            return step(ids, mask, cache, routing)

    engine.passes.step = surrounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        del engine.passes.step


@dataclass(slots=True)
class Clock:
    """Processor seconds of the engine's thread in passes, which others on the machine lengthen little. Two looks at it
    are a microsecond of milliseconds, so timed arms may have one.
    """

    decode_s: float = 0.0
    prompt_s: float = 0.0

    @contextmanager
    def around(self, ids: Tensor, _: Routing) -> Iterator[None]:
        started = time.thread_time()
        yield
        seconds = time.thread_time() - started
        if ids.shape[1] == 1:
            self.decode_s += seconds
        else:
            self.prompt_s += seconds


class Touched:
    """Counts the distinct experts of every decode step. Who is watched goes the slow way: never beside a clock."""

    def __init__(self, experts: int) -> None:
        """`experts` of a layer; what has a higher number is nobody's."""
        self.steps = self.tokens = self.hits = 0
        self._none = experts

    @contextmanager
    def around(self, ids: Tensor, routing: Routing) -> Iterator[None]:
        if ids.shape[1] > 1:
            yield
            return
        routing.observer = self
        try:
            yield
        finally:
            routing.observer = None
        self.steps += 1
        self.tokens += len(ids)

    def routed(self, layer: int, x: Tensor, logits: Tensor, weights: Tensor, index: Tensor, valid: Tensor) -> None:
        """`index` [T, k] of one layer."""
        distinct = torch.unique(index[valid])
        self.hits += int((distinct < self._none).sum())

    def residual(self, layer: int, h: Tensor) -> None:
        """Not needed."""

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        """Not needed."""

    def combined(self, layer: int, y: Tensor) -> None:
        """Not needed."""


@dataclass(frozen=True, slots=True)
class StepWeights:
    """Bytes of weights as they are served: of one expert, and of everything dense that any step reads."""

    expert: int
    dense: int

    @classmethod
    def of(cls, engine: Engine) -> StepWeights:
        geometry = engine.card.geometry
        item = ITEMSIZE[engine.plan.dtype]
        return cls(engine.bank.slot_bytes, dense_bytes(engine.checkpoint) * item // ITEMSIZE[geometry.dtype])
