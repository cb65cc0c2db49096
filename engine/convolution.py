"""Causal convolutions of each channel by itself, before linear attention and state spaces, through engine.products.

For one token torch takes ten times as long as its few products, and for many it wants channels apart that lie beside
each other. B rows, S tokens, C channels, W tokens that each sees, K that a state keeps.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from engine.attention import close_enough
from engine.products import Products, of_one_kind
from engine.substitution import Stand, answer_of, lie_in_one

TAKES = frozenset({"hidden_states", "weight", "bias", "activation"})
STEP_TAKES = TAKES | {"conv_state"}
SILU = ("silu", "swish")
TRIALS = tuple(product((False, True), (None, SILU[0])))  # with biases, and with what activation


def convolution(own: Products) -> Stand:
    """Of many tokens, with nothing before them."""
    return Stand(TAKES, partial(_agrees, own), partial(_apply, own))


def convolution_step(own: Products) -> Stand:
    """Of one token, after those that a state keeps."""
    return Stand(STEP_TAKES, partial(_step_agrees, own), partial(_apply_step, own))


def outline(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """The shape of what either gives."""
    rows, channels, tokens = hidden_states.shape
    return hidden_states.new_empty(rows, tokens, channels).transpose(1, 2)


def _trial(tokens: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [B, C, S], weights [C, W], biases [C], a state [B, C, W]."""
    made = torch.Generator().manual_seed(17)
    x, state = torch.randn(2, 5, tokens, generator=made), torch.randn(2, 5, 4, generator=made)
    return x, torch.randn(5, 4, generator=made), torch.randn(5, generator=made) if bias else None, state


def _agrees(own: Products, theirs: Any) -> bool:
    for bias, activation in TRIALS:
        x, weight, biases, _ = _trial(9, bias)
        wanted = answer_of(theirs, x, weight, biases, activation=activation)
        found = own.convolve(x.transpose(1, 2), weight, biases, silu=activation is not None).transpose(1, 2)
        if wanted is None or wanted.shape != found.shape or not close_enough(found, wanted):
            return False
    return True


def _step_agrees(own: Products, theirs: Any) -> bool:
    for bias, activation in TRIALS:
        x, weight, biases, state = _trial(1, bias)
        left = state.clone()
        wanted = answer_of(theirs, x, state, weight, biases, activation=activation)
        found = own.convolve_step(x[..., 0], left, weight, biases, silu=activation is not None)
        if wanted is None or not (close_enough(found, wanted[..., 0]) and left.equal(state)):
            return False
    return True


def _apply(
    own: Products, theirs: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, **rest: Any,
) -> Any:  # fmt: skip
    """`hidden_states` [B, C, S], `weight` [C, W] -> [B, C, S], in which a token's channels lie beside each other."""
    if lie_in_one(rest) or not _takes(hidden_states, weight, bias, activation):
        return theirs(hidden_states, weight, bias, activation=activation, **rest)
    return own.convolve(hidden_states.transpose(1, 2), weight, bias, silu=activation is not None).transpose(1, 2)


def _apply_step(
    own: Products, theirs: Any, hidden_states: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, **rest: Any,
) -> Any:  # fmt: skip
    """`hidden_states` [B, C, 1], `conv_state` [B, C, K], which moves on by it -> [B, C, 1]."""
    alike = conv_state.dtype == weight.dtype and conv_state.is_contiguous() and hidden_states.shape[2] == 1
    if not alike or not _takes(hidden_states, weight, bias, activation):
        return theirs(hidden_states, conv_state, weight, bias, activation=activation, **rest)
    found = own.convolve_step(hidden_states[..., 0], conv_state, weight, bias, silu=activation is not None)
    return found.unsqueeze(2)


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> bool:
    held = [weight] if bias is None else [weight, bias]
    return of_one_kind(x, *held) and all(each.is_contiguous() for each in held) and activation in (None, *SILU)
