"""Linear attention by the gated delta rule through engine.products: Qwen3-Next's, whose heads fade as one, and Kimi's,
whose numbers fade each at its own rate.

transformers has the rule as two functions, one for a token and one for many, which lays a prompt out in chunks of 64
and takes many times its size; ours goes from token to token in the caches for both, so that a row is the same however a
prompt is cut. B rows, S tokens, N heads of keys, A heads, D and V the widths of keys and values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.attention import close_enough
from engine.products import Products, of_one_kind
from engine.substitution import Stand, answer_of, lie_in_one

TAKES = frozenset({"query", "key", "value", "g", "beta", "initial_state", "output_final_state"})
NORMALISED = "use_qk_l2norm_in_kernel"
LEAST = 1e-6  # that transformers adds to a squared length
LENGTHS = (1, 70)  # tokens of a trial: more than a chunk of theirs


def delta_rule(own: Products) -> Stand:
    """In place of both functions."""
    return Stand(TAKES, partial(_agrees, own), partial(_apply, own))


def outline(
    query: Tensor, key: Tensor, value: Tensor, *, initial_state: Tensor | None = None,
    output_final_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """The shapes of what the rule gives."""
    state = _state(key, value) if initial_state is None else initial_state
    return query.new_empty(value.shape), state if output_final_state else None


def _state(key: Tensor, value: Tensor) -> Tensor:
    """Of nothing: f32 [B, A, D, V]."""
    return value.new_zeros(len(value), value.shape[2], key.shape[3], value.shape[3], dtype=torch.float32)


def _agrees(own: Products, theirs: Any) -> bool:
    """Whether `theirs` gives what ours does, with a state before it and without one, of whichever decay it takes."""
    made = torch.Generator().manual_seed(11)
    tried = [_agrees_on(own, theirs, length, each, made) for length in LENGTHS for each in (False, True)]
    return any(tried) and all(one is not False for one in tried)


def _agrees_on(own: Products, theirs: Any, length: int, each: bool, made: torch.Generator) -> bool | None:
    """None where it does not take such a decay."""
    heads, width = 2, 8
    q, k, v = torch.randn(3, 2, length, heads, width, generator=made).unbind()
    fading = (2, length, heads, width) if each else (2, length, heads)
    g, beta = -torch.rand(fading, generator=made), torch.rand(2, length, heads, generator=made)
    state = torch.randn(2, heads, width, width, generator=made)
    for before in (None, state):
        given = {"g": g, "beta": beta, "initial_state": before, "output_final_state": True, NORMALISED: True}
        if (answer := answer_of(theirs, q, k, v, **given)) is None:
            return None
        wanted, left = answer
        start = torch.zeros_like(state) if before is None else before.clone()
        found = own.delta(q, k, v, g, beta, start, LEAST)
        if not (close_enough(found, wanted) and close_enough(start, left)):
            return False
    return True


def _apply(
    own: Products,
    theirs: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **rest: Any,
) -> Any:
    """`query`, `key` [B, S, N, D], `value` [B, S, A, V], `g` [B, S, A] or [B, S, A, D], `beta` [B, S, A] ->
    [B, S, A, V] and the state f32 [B, A, D, V]: `initial_state` itself, written over, where there is one."""
    state = _state(key, value) if initial_state is None else initial_state
    if lie_in_one(rest) or not use_qk_l2norm_in_kernel or not _takes(query, key, value, state):
        return theirs(
            query, key, value, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **rest,
        )  # fmt: skip
    out = own.delta(query, key, value, g, beta, state, LEAST)
    return out, state if output_final_state else None


def _takes(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> bool:
    return of_one_kind(q, k, v) and state.dtype == torch.float32 and state.is_contiguous()
