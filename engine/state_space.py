"""State spaces of Mamba 2's kind (Granite 4, Nemotron-H) through engine.products.

transformers has two functions, one for a token and one for many, which lays a prompt out in chunks and takes all pairs
of a chunk's tokens; ours goes from token to token in the caches for both, so that a row is the same however a prompt is
cut. B rows, S tokens, G groups of heads that share keys, A heads, P values of a head, N numbers of a key.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention import close_enough
from engine.products import Products, of_one_kind
from engine.substitution import Stand, answer_of, lie_in_one

SHARED = frozenset({"hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "dt_softplus"})
TAKES = SHARED | {"initial_states", "return_final_states", "dt_limit", "chunk_size"}
STEP_TAKES = SHARED | {"state"}
LENGTHS = (1, 21)  # tokens of a trial
CHUNK = 8  # of theirs, in a trial
NO_LIMIT = (0.0, float("inf"))


def state_space(own: Products) -> Stand:
    """Of many tokens."""
    return Stand(TAKES, partial(_agrees, own), partial(_apply, own))


def state_space_step(own: Products) -> Stand:
    """Of one token, after a state that it changes."""
    return Stand(STEP_TAKES, partial(_step_agrees, own), partial(_apply_step, own))


def outline(
    x: Tensor, *others: Tensor, initial_states: Tensor | None = None, return_final_states: bool = False, **_: Any
) -> Any:  # fmt: skip
    """The shapes of what many tokens give; of the `others` the third are keys."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    state = _state(x, others[2]) if initial_states is None else initial_states
    return (out, state) if return_final_states else out


def step_outline(_: Tensor, x: Tensor, *__: Any, **___: Any) -> Tensor:
    """The shape of what one token gives."""
    return x.new_empty(x.shape)


def _state(x: Tensor, k: Tensor) -> Tensor:
    """Of nothing: f32 [B, A, P, N]."""
    rows, _, heads, values = x.shape
    return x.new_zeros(rows, heads, values, k.shape[3], dtype=torch.float32)


def _trial(tokens: int, made: torch.Generator) -> dict[str, Tensor]:
    """Of two rows, four heads in two groups."""
    return {
        "x": torch.randn(2, tokens, 4, 5, generator=made),
        "dt": torch.randn(2, tokens, 4, generator=made),
        "A": -torch.rand(4, generator=made),
        "B": torch.randn(2, tokens, 2, 6, generator=made),
        "C": torch.randn(2, tokens, 2, 6, generator=made),
        "D": torch.randn(4, generator=made),
        "dt_bias": torch.randn(4, generator=made),
        "state": torch.randn(2, 4, 5, 6, generator=made),
    }


def _agrees(own: Products, theirs: Any) -> bool:
    made = torch.Generator().manual_seed(23)
    for tokens in LENGTHS:
        for begun in (False, True):
            t = _trial(tokens, made)
            before = t["state"] if begun else None
            state = t["state"].clone() if begun else torch.zeros_like(t["state"])
            answer = answer_of(
                theirs, t["x"], t["dt"], t["A"], t["B"], t["C"], chunk_size=CHUNK, D=t["D"], dt_bias=t["dt_bias"],
                initial_states=before, dt_softplus=True, dt_limit=(0.01, 0.9), return_final_states=True,
            )  # fmt: skip
            if answer is None:
                return False
            wanted, left = answer
            steps = _steps(t["dt"], t["dt_bias"], (0.01, 0.9))
            found = own.scan(t["x"], t["B"], t["C"], steps, t["A"], t["D"], state)
            if not (close_enough(found, wanted) and close_enough(state, left)):
                return False
    return True


def _step_agrees(own: Products, theirs: Any) -> bool:
    t = _trial(1, torch.Generator().manual_seed(29))
    state, theirs_after = t["state"].clone(), t["state"].clone()
    heads, values = t["x"].shape[2:]
    wanted = answer_of(
        theirs, theirs_after, t["x"][:, 0], t["dt"][:, 0, :, None].expand(-1, -1, values),
        t["A"][:, None, None].expand(heads, values, t["B"].shape[3]), t["B"][:, 0], t["C"][:, 0],
        t["D"][:, None].expand(heads, values), dt_bias=t["dt_bias"][:, None].expand(heads, values), dt_softplus=True,
    )  # fmt: skip
    if wanted is None:
        return False
    steps = _steps(t["dt"], t["dt_bias"], NO_LIMIT)
    found = own.scan(t["x"], t["B"], t["C"], steps, t["A"], t["D"], state)
    return close_enough(found[:, 0], wanted) and close_enough(state, theirs_after)


def _steps(dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """How much each token counts, in `dt`'s own precision as theirs is: [B, S, A] -> f32 [B, S, A]."""
    return F.softplus(dt + bias.to(dt.dtype)).clamp(*limit).float()


def _apply(
    own: Products, theirs: Any, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,  # noqa: N803
    chunk_size: int, D: Tensor | None = None, dt_bias: Tensor | None = None,  # noqa: N803
    initial_states: Tensor | None = None, dt_softplus: bool = False, dt_limit: tuple[float, float] = NO_LIMIT,
    return_final_states: bool = False, **rest: Any,
) -> Any:  # fmt: skip
    """`hidden_states` [B, S, A, P], `dt` [B, S, A], `A` and `D` [A], `B`, `C` [B, S, G, N] -> f32 [B, S, A, P], and the
    state f32 [B, A, P, N] if it is wanted: `initial_states` itself, written over, where there are any."""
    state = _state(hidden_states, B) if initial_states is None else initial_states
    odd = lie_in_one(rest) or rest.get("z") is not None
    if odd or not dt_softplus or dt_bias is None or not _takes(hidden_states, B, C, state):
        return theirs(
            hidden_states, dt, A, B, C, chunk_size=chunk_size, D=D, dt_bias=dt_bias, initial_states=initial_states,
            dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states, **rest,
        )  # fmt: skip
    out = own.scan(hidden_states, B, C, _steps(dt, dt_bias, dt_limit), A, D, state)
    return (out, state) if return_final_states else out


def _apply_step(
    own: Products, theirs: Any, state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor,  # noqa: N803
    C: Tensor, D: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,  # noqa: N803
    z: Tensor | None = None, **rest: Any,
) -> Tensor:  # fmt: skip
    """`state` f32 [B, A, P, N], written over, `hidden_states` [B, A, P], `B`, `C` [B, G, N] -> [B, A, P]. All else has
    the same number for a whole head, spread out."""
    spread = [dt, A[..., 0], *(each for each in (D, dt_bias) if each is not None)]
    alike = A.dim() == 3 and A.stride(2) == 0 and all(each.stride(-1) == 0 for each in spread)
    odd = lie_in_one(rest) or z is not None
    if odd or not alike or not dt_softplus or dt_bias is None or not _takes(hidden_states[:, None], B, C, state):
        found: Tensor = theirs(
            state, hidden_states, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus, **rest
        )
        return found
    steps = _steps(dt[:, None, :, 0], dt_bias[:, 0], NO_LIMIT)
    skip = None if D is None else D[:, 0]
    out = own.scan(hidden_states[:, None], B[:, None], C[:, None], steps, A[:, 0, 0], skip, state)
    return out[:, 0].to(hidden_states.dtype)


def _takes(x: Tensor, k: Tensor, q: Tensor, state: Tensor) -> bool:
    return of_one_kind(x, k, q) and state.dtype == torch.float32 and state.is_contiguous()
