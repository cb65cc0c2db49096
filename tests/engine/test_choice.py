"""A router's choice by the best of a softmax: against routers of transformers, and who keeps its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from engine.choice import Choice
from engine.engine import Engine

# Whether weights are renormalised.
SOFTMAX = {"qwen2_moe": False, "qwen3_moe": True, "mixtral": True, "olmoe": False, "qwen3_next": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_routers_of_families_are_found_out(
    family: str, dtype: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint(family), dtype=dtype)
    for joint, route in zip(engine.layers._joints, engine.board.routes, strict=True):
        choice = Choice.of(joint.router, route, engine.card.hidden)
        assert (choice is not None) == (family in SOFTMAX)
        if choice is not None:
            assert (choice.experts, choice.top_k) == (engine.card.experts, engine.card.top_k)
            assert (choice.renormalised, choice.scale) == (SOFTMAX[family], 1.0)


class _Plain(nn.Module):
    """A softmax router of known weights."""

    num_experts = 6

    def __init__(self, scale: float = 1.0, shift: float = 0.0, cap: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10), requires_grad=False)
        self.scale, self.shift, self.cap = scale, shift, cap

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.t() + self.shift * torch.arange(6)
        weights, index = (self.cap * (logits / self.cap).tanh() if self.cap else logits).softmax(-1).topk(2)
        return logits, weights * self.scale, index


def test_a_scale_is_found_and_what_shifts_or_caps_its_logits_keeps_its_own() -> None:
    scaled = _Plain(scale=2.5)
    found = Choice.of(scaled, scaled.forward, 10)
    assert found is not None
    assert found.scale == pytest.approx(2.5)
    for other in (_Plain(shift=0.5), _Plain(cap=3.0)):
        assert Choice.of(other, other.forward, 10) is None


def test_what_is_forbidden_is_never_chosen_and_the_rest_is_nobodys() -> None:
    choice = Choice(5, 3, False, 1.0, torch.float32)
    logits = torch.tensor([[3.0, 1.0, 1.0, 9.0, 0.0]])
    weights, index = choice.plain(logits, torch.tensor([False, False, False, True, True]))
    assert index.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.tensor([3.0, 1.0, 1.0]).softmax(-1).unsqueeze(0))
    weights, index = choice.plain(logits, torch.tensor([True, False, True, True, True]))
    assert index.tolist() == [[1, 5, 5]]
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
