"""Causal convolutions by our own products, against torch's in float64, and functions put in the place of a model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.lfm2_moe import modeling_lfm2_moe as lfm2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from engine.convolution import TAKES, convolution, convolution_step
from engine.delta_rule import delta_rule
from engine.engine import Engine
from engine.products import Products
from engine.substitution import Stand, substitute

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


def _slow(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """`x` [B, S, C] -> [B, S, C], in float64."""
    turned = F.pad(x.double().transpose(1, 2), (weight.shape[1] - 1, 0))
    bias = None if bias is None else bias.double()
    found = F.conv1d(turned, weight.double().unsqueeze(1), bias, groups=len(weight)).transpose(1, 2)
    return F.silu(found) if silu else found


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "channels", "width"), [(1, 3, 4), (2, 16, 4), (9, 37, 3), (40, 64, 2)])
def test_it_is_the_convolution(
    own: Products, tokens: int, channels: int, width: int, biased: bool, silu: bool
) -> None:  # fmt: skip
    x, weight = torch.randn(2, tokens, channels), torch.randn(channels, width)
    bias = torch.randn(channels) if biased else None
    wanted = _slow(x, weight, bias, silu)
    torch.testing.assert_close(own.convolve(x, weight, bias, silu=silu).double(), wanted, rtol=1e-5, atol=1e-5)
    apart = x.transpose(1, 2).contiguous().transpose(1, 2)  # a channel's tokens beside each other
    assert own.convolve(apart, weight, bias, silu=silu).equal(own.convolve(x, weight, bias, silu=silu))


def test_bfloat16_is_rounded_before_silu_and_after_it(own: Products) -> None:
    x, weight = torch.randn(2, 9, 37).bfloat16(), torch.randn(37, 4).bfloat16()
    before = _slow(x, weight, None, silu=False).to(torch.bfloat16)
    torch.testing.assert_close(own.convolve(x, weight, None, silu=False), before, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(own.convolve(x, weight, None, silu=True), F.silu(before), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "seen"), [(4, 4), (4, 3), (3, 5)])
def test_token_by_token_it_is_the_same_and_the_state_moves_on(
    own: Products, width: int, seen: int, dtype: torch.dtype
) -> None:
    x, weight, bias = torch.randn(2, 12, 21).to(dtype), torch.randn(21, width).to(dtype), torch.randn(21).to(dtype)
    state = torch.zeros(2, 21, seen, dtype=dtype)
    steps = [own.convolve_step(x[:, at], state, weight, bias, silu=True) for at in range(12)]
    wanted = own.convolve(x, weight, bias, silu=True)
    torch.testing.assert_close(
        torch.stack(steps, 1), wanted, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert state.equal(x[:, -seen:].transpose(1, 2))


def test_threads_change_no_number(own: Products, threads: Callable[[int], None]) -> None:
    x, weight = torch.randn(3, 301, 256), torch.randn(256, 4)
    threads(1)
    alone = own.convolve(x, weight, None, silu=True)
    threads(2)
    assert own.convolve(x, weight, None, silu=True).equal(alone)


def test_numbers_that_are_none_stay_none(own: Products) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((1, 2, 5), torch.nan, dtype=dtype)
        assert own.convolve(x, torch.ones(5, 4, dtype=dtype), None, silu=True).isnan().all()


@pytest.mark.parametrize("module", [qwen, lfm2])
def test_transformers_functions_are_recognised(own: Products, module: Any) -> None:
    assert convolution(own).agrees(module.causal_conv1d_fn)
    assert convolution_step(own).agrees(module.causal_conv1d_update)


def test_functions_that_take_the_same_and_do_something_else_are_not(own: Products) -> None:
    def later(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Any:
        return qwen.causal_conv1d_fn(hidden_states.roll(1, -1), weight, bias, activation)

    def keeping(
        hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Any = None, activation: Any = None
    ) -> Any:
        return qwen.causal_conv1d_update(hidden_states, conv_state.clone(), weight, bias, activation)

    assert not convolution(own).agrees(later)
    assert not convolution_step(own).agrees(keeping)


def test_modules_of_one_model_call_ours_and_the_family_keeps_its_own(own: Products) -> None:
    made = torch.Generator().manual_seed(1)
    config = qwen.Qwen3NextConfig(
        hidden_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention"], num_hidden_layers=1,
    )  # fmt: skip
    theirs, ours = (qwen.Qwen3NextGatedDeltaNet(config, 0).eval() for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    before = dict(vars(qwen))
    assert substitute(ours, [delta_rule(own), convolution(own), convolution_step(own)]) == 1
    assert dict(vars(qwen)) == before
    x = torch.randn(2, 5, 16, generator=made)
    called: list[str] = []
    for name in ("delta", "convolve"):
        _note(own, name, called)
    with torch.inference_mode():
        wanted = theirs(x)
        assert not called
        torch.testing.assert_close(ours(x), wanted, rtol=1e-3, atol=1e-4)
    assert sorted(called) == ["convolve", "delta"]


def test_a_function_is_tried_once_however_many_modules_call_it() -> None:
    tried: list[Any] = []

    def agrees(theirs: Any) -> bool:
        tried.append(theirs)
        return False

    config = qwen.Qwen3NextConfig(hidden_size=16, layer_types=["linear_attention"] * 3, num_hidden_layers=3)
    layers = torch.nn.ModuleList(qwen.Qwen3NextGatedDeltaNet(config, at) for at in range(3))
    assert substitute(layers, [Stand(TAKES, agrees, lambda *_: None)]) == 0
    assert sorted(each.__name__ for each in tried) == ["causal_conv1d_fn", "causal_conv1d_update"]


def _note(own: Products, name: str, called: list[str]) -> None:
    """Calls of `own`'s method are written down."""
    method = getattr(own, name)

    def noted(*args: Any, **named: Any) -> Any:
        called.append(name)
        return method(*args, **named)

    setattr(own, name, noted)
