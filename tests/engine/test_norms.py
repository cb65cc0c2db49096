"""Norms by our own loop equal the modules' own, and modules that compute something else keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from engine.engine import Engine
from engine.norms import FEW, adopt_norms, computes_the_usual
from engine.products import Products, instruction_sets
from engine.requests import GenerationRequest, TokenEvent

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def own() -> Products:
    return Products(next(iter(instruction_sets())))


def _trained(module: Any, dtype: torch.dtype) -> Any:
    """With weights that are neither ones nor zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 16, 64, 100, 1024])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_a_norm_is_that_of_float64(own: Products, dtype: torch.dtype, columns: int, size: float) -> None:
    x, weight = (torch.randn(3, 5, columns) * size).to(dtype), torch.randn(columns).to(dtype)
    ours = own.norm(x, weight, 1e-6)
    wide = x.double()
    truth = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=0)
    assert ours.dtype == dtype


def test_rows_may_lie_anywhere_and_do_not_depend_on_each_other(own: Products) -> None:
    x, weight = torch.randn(6, 4, 32).bfloat16().transpose(0, 1), torch.randn(32).bfloat16()
    whole = own.norm(x, weight, 1e-5)
    assert torch.equal(whole, torch.stack([torch.stack([own.norm(row, weight, 1e-5) for row in part]) for part in x]))


def test_no_number_stays_no_number(own: Products) -> None:
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    ours = own.norm(x, torch.ones(8), 1e-6)
    assert ours[0].isnan().all()
    assert ours[1, 3].isnan()
    assert torch.equal(ours[2], torch.ones(8).mul(ours[2, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_usual_norm_is_taken_over_for_few_numbers_alone(own: Products, dtype: torch.dtype) -> None:
    module, plain = (_trained(OlmoeRMSNorm(64, eps=1e-5), dtype) for _ in range(2))
    plain.load_state_dict(module.state_dict())
    adopt_norms(nn.Sequential(module), own)
    for rows in (1, 3, FEW // 64, FEW // 64 + 1):
        x = torch.randn(1, rows, 64).to(dtype)
        torch.testing.assert_close(module(x), plain(x))
    many = torch.randn(1, FEW // 64 + 1, 64).to(dtype)
    assert torch.equal(module(many), plain(many))
    assert "forward" in vars(module)
    if dtype == torch.bfloat16:
        wider = torch.randn(2, 64)
        assert torch.equal(module(wider), plain(wider))


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_arithmetic_keeps_its_own(own: Products, dtype: torch.dtype) -> None:
    class CentredRMSNorm(OlmoeRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            centred: Tensor = super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))
            return centred

    class OtherEpsRMSNorm(OlmoeRMSNorm):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor) -> Tensor:
            size = hidden_states.float().square().mean(-1, keepdim=True).sqrt()
            normed: Tensor = self.weight * (hidden_states / (size + 1e-5))
            return normed

    others = [GemmaRMSNorm(64), Qwen3NextRMSNormGated(64), CentredRMSNorm(64), OtherEpsRMSNorm(64), nn.LayerNorm(64)]
    model = nn.Sequential(*(_trained(module, dtype) for module in others))
    adopt_norms(model, own)
    assert not [module for module in model if "forward" in vars(module)]
    assert not computes_the_usual(_trained(OlmoeRMSNorm(64), torch.float16), own)


def test_an_engine_takes_them_and_says_the_same(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], ask: Callable[..., GenerationRequest]
) -> None:
    folder = checkpoint("olmoe")
    answers = []
    for kernel, taken in (("own", True), ("torch", False)):
        engine = open_engine(folder, kernel=kernel)
        norms = [module for module in engine.passes._model.modules() if "RMSNorm" in type(module).__name__]
        assert norms
        assert all(("forward" in vars(module)) == taken for module in norms)
        events = engine.generate([ask((3, 5, 7), max_tokens=8), ask((9, 2), max_tokens=8)])
        answers.append([(event.row, event.token) for event in events if isinstance(event, TokenEvent)])
    assert answers[0] == answers[1]
