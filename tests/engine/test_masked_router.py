"""Routing from masked logits against sliced routers, for every family that it can serve."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.engine import Engine
from engine.masked_router import MaskedRouter
from engine.restriction import restrict
from store.records import Selection

SERVED = {"qwen2_moe", "qwen3_moe", "qwen3_next", "mixtral", "olmoe"}


def _ranked(weights: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    """[T, 2k]: the logits of what was chosen, and the weights, each in order, of ties either will do."""
    return torch.cat([logits.gather(1, index).float().sort(-1).values, weights.float().sort(-1).values], 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_token_gets_what_the_sliced_router_of_its_own_selection_gives(
    family: str, dtype: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint(family), dtype=dtype)
    assert bool(engine.board.masked) == (family in SERVED)
    tolerance = 1e-5 if dtype == "float32" else 0.01
    rng, experts, top_k = random.Random(4), engine.card.experts, engine.card.top_k
    for router, joint in zip(engine.board.masked, engine.layers._joints, strict=bool(engine.board.masked)):
        x = torch.randn(40, engine.card.hidden).to(getattr(torch, dtype))  # [T, H]
        own = [sorted(rng.sample(range(experts), rng.randint(top_k, experts))) for _ in x]
        forbidden = torch.ones(40, experts, dtype=torch.bool)
        for token, ids in enumerate(own):
            forbidden[token, ids] = False
        with torch.inference_mode():
            logits = joint.router.forward.inner(x)[0]  # [T, E]
            weights, index = router(logits, forbidden)
            assert not forbidden.gather(1, index).any()
            ours = _ranked(weights, index, logits)
            for token, ids in enumerate(own):
                here = slice(token, token + 1)
                theirs = _ranked(*restrict(joint.router, ids).route(x[here], logits[here]), logits[here])
                torch.testing.assert_close(ours[here], theirs, rtol=0.02, atol=tolerance)


def test_rows_of_many_tasks_are_routed_by_one_call_a_layer(
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    random_selection: Callable[[Engine, random.Random], Selection],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = open_engine(checkpoint("olmoe"))
    rng, calls = random.Random(1), []
    real = MaskedRouter.__call__

    def counted(self: MaskedRouter, logits: Tensor, forbidden: Tensor) -> Any:
        calls.append(tuple(forbidden.shape))
        return real(self, logits, forbidden)

    monkeypatch.setattr(MaskedRouter, "__call__", counted)
    selections = [random_selection(engine, rng), None, *(random_selection(engine, rng) for _ in range(3))]
    ids = torch.randint(0, 256, (5, 4))
    engine.forward(ids, torch.ones_like(ids), selections)
    assert calls == [(20, 8)] * engine.card.layers


class _Plain(nn.Module):
    """A router like Mixtral's, of known weights."""

    num_experts = 6

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__()
        self.hidden_dim = hidden
        self.weight = nn.Parameter(torch.randn(experts, hidden), requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden.reshape(-1, self.hidden_dim) @ self.weight.t()
        weights, index = logits.softmax(-1).topk(2)
        return logits, weights, index


class _Biased(_Plain):
    """Forbidden experts would win by their bias."""

    def __init__(self, experts: int, hidden: int) -> None:
        super().__init__(experts, hidden)
        self.bias = nn.Parameter(torch.randn(experts), requires_grad=False)


class _Normed(_Plain):
    """What it does with its input is more than a product."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().forward(hidden / hidden.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(("kind", "served"), [(_Plain, True), (_Biased, False), (_Normed, False)])
def test_only_routers_whose_logits_decide_alone_are_served(kind: type[_Plain], served: bool) -> None:
    router = kind(6, 10)
    assert (MaskedRouter.of(router, router.forward, 10) is not None) == served


def test_a_choice_that_could_only_go_to_a_forbidden_expert_goes_to_nobody() -> None:
    router = _Plain(6, 10)
    masked = MaskedRouter.of(router, router.forward, 10)
    assert masked is not None
    logits = torch.tensor([[0.0, 1e4, 0.0, 0.0, -1e4, 0.0]])  # expert 4 is so far behind that its weight is nothing
    weights, index = masked(logits, torch.tensor([True, False, True, True, False, True]))
    assert index[0, 0] == 1
    assert index[0, 1] in (4, 6)
    assert weights.tolist() == [[1.0, 0.0]]
