"""State spaces by our own products, number by number in plain Python, and transformers' functions of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

from engine.engine import Engine
from engine.products import Products
from engine.state_space import state_space, state_space_step

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

ROWS, GROUPS, HEADS = 2, 2, 4


def _draw(tokens: int, values: int, keys: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """x, k, q, steps, fading, skip and a state; as in a model, x, k and q lie in one tensor."""
    mixed = torch.randn(ROWS, tokens, HEADS * values + 2 * GROUPS * keys).to(dtype)
    x, k, q = mixed.split([HEADS * values, GROUPS * keys, GROUPS * keys], -1)
    shape = (ROWS, tokens, GROUPS, keys)
    steps, fading, skip = torch.rand(ROWS, tokens, HEADS), -3 * torch.rand(HEADS), torch.randn(HEADS)
    state = torch.randn(ROWS, HEADS, values, keys)
    return x.view(ROWS, tokens, HEADS, values), k.view(shape), q.view(shape), steps, fading, skip, state


def _slow(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Number by number, in float64."""
    x, k, q, steps, fading, skip, state = (each.double() for each in inputs)
    state, out = state.clone(), torch.zeros_like(x)
    for row in range(ROWS):
        for head in range(HEADS):
            s, shared = state[row, head], head // (HEADS // GROUPS)  # [P, N]
            for token in range(x.shape[1]):
                step, given = steps[row, token, head], x[row, token, head]
                s *= (step * fading[head]).exp()
                s += torch.outer(step * given, k[row, token, shared])
                out[row, token, head] = s @ q[row, token, shared] + skip[head] * given
    return out, state


@pytest.mark.parametrize(("values", "keys"), [(8, 8), (5, 19), (6, 83), (64, 128)])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_it_is_the_recurrence_number_by_number(own: Products, tokens: int, values: int, keys: int) -> None:
    inputs = _draw(tokens, values, keys)
    wanted, left = _slow(inputs)
    state = inputs[6].clone()
    torch.testing.assert_close(own.scan(*inputs[:6], state).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), left, rtol=1e-4, atol=1e-5)


def test_bfloat16_goes_in_and_sums_are_float32(own: Products) -> None:
    inputs = _draw(9, 8, 24, torch.bfloat16)
    wanted, left = _slow(inputs)
    state = inputs[6].clone()
    torch.testing.assert_close(own.scan(*inputs[:6], state).double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state.double(), left, rtol=1e-4, atol=1e-5)


def test_without_a_skip_nothing_is_added(own: Products) -> None:
    x, k, q, steps, fading, skip, state = _draw(3, 8, 8)
    bare = own.scan(x, k, q, steps, fading, None, state.clone())
    torch.testing.assert_close(bare + skip[:, None] * x, own.scan(x, k, q, steps, fading, skip, state))


@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_a_row_is_the_same_to_the_bit_however_its_tokens_are_cut_beside_whomever_on_any_number_of_threads(
    own: Products, cut: int, threads: Callable[[int], None]
) -> None:
    x, k, q, steps, fading, skip, state = _draw(70, 16, 48)
    whole = state.clone()
    threads(2)
    wanted = own.scan(x, k, q, steps, fading, skip, whole)
    threads(1)
    alone = state[1:].clone()
    first, second = (
        own.scan(x[1:, part], k[1:, part], q[1:, part], steps[1:, part], fading, skip, alone)
        for part in (slice(0, cut), slice(cut, 70))
    )
    assert torch.cat([first, second], 1).equal(wanted[1:])
    assert alone.equal(whole[1:])


@pytest.mark.parametrize("module", [granite, nemotron])
def test_transformers_functions_are_recognised(own: Products, module: Any) -> None:
    assert state_space(own).agrees(module.mamba2_chunk_scan)
    assert state_space_step(own).agrees(module.mamba2_selective_state_update)


def test_functions_that_take_the_same_and_do_something_else_are_not(own: Products) -> None:
    def unlimited(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_limit: Any = None, **rest: Any  # noqa: N803
    ) -> Any:  # fmt: skip
        return granite.mamba2_chunk_scan(hidden_states, dt, A, B, C, **rest)

    def keeping(state: Tensor, *rest: Any, **named: Any) -> Any:
        return granite.mamba2_selective_state_update(state.clone(), *rest, **named)

    assert not state_space(own).agrees(unlimited)
    assert not state_space_step(own).agrees(keeping)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["granitemoehybrid", "nemotron_h"])
def test_layers_call_it_for_prompts_and_for_single_tokens(
    kind: str, dtype: str, checkpoint: Checkpoint, open_engine: Open, ask: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = open_engine(checkpoint(kind), dtype=dtype)
    assert ", running states of " in engine.kernel
    engine.tokenizer.eos = frozenset()
    called: list[int] = []
    scan = Products.scan

    def counted(own: Products, x: Tensor, *rest: Any) -> Tensor:
        called.append(x.shape[1])
        return scan(own, x, *rest)

    monkeypatch.setattr(Products, "scan", counted)
    list(engine.generate([ask((1, 2, 3, 4, 5), max_tokens=3)]))
    layers = len(called) // 3
    assert layers > 0
    assert called == [5] * layers + [1] * 2 * layers
