"""Routers take our products; what else they do is their own code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.engine import Engine
from engine.restriction import adopt_linear, call_router

TOKENS = 3


def routers(engine: Engine) -> list[Any]:
    return [joint.router for joint in engine.layers._joints]


def test_a_router_says_what_it_said_with_products_of_its_own(
    family: str, checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint(family))
    x = torch.randn(TOKENS, engine.card.hidden)
    asked: list[tuple[int, ...]] = []

    def watched(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append(tuple(weight.shape))
        return F.linear(rows, weight, bias)

    for router in routers(engine):
        with torch.inference_mode():
            wanted = type(router).forward(router, x) if not router._buffers else call_router(router, x)
            adopt_linear(router, watched)
            found = call_router(router, x)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert set(asked) <= {(engine.card.experts, engine.card.hidden)}
    assert asked, "the router's product went past"


def test_nothing_of_transformers_own_is_changed(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    """Another model of the same class in this process keeps torch's products."""
    folder = checkpoint("olmoe")
    engine = open_engine(folder)
    kind = type(routers(engine)[0])
    assert kind.forward.__globals__["F"] is F
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not [module for module in plain.modules() if isinstance(module, kind) and "moepager_forward" in vars(module)]


def test_with_torchs_kernel_routers_are_left_alone(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    engine = open_engine(checkpoint("olmoe"), kernel="torch")
    assert not [router for router in routers(engine) if "moepager_forward" in vars(router)]


def test_a_router_without_such_a_product_is_called_as_it_is() -> None:
    class Router(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x, x * 2, x * 3

    router = Router()
    adopt_linear(router, pytest.fail)
    assert [float(one) for one in call_router(router, torch.ones(1, 1))] == [1.0, 2.0, 3.0]
