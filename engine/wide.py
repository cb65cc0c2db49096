"""Products, attention and decoder layers of many tokens by AVX-512 BF16 (engine.products), as fast as it multiplies.

Rows lie across the lanes of vectors, so that no sum is taken across them and a token never depends on its batch. All in
bfloat16, on the CPU; elsewhere torch does this. Hands addresses to C, as engine.products does.

T tokens, B rows of S new ones each, C columns of the cache, A heads, N of the cache, D and V the width of a key and of
a value, E experts, k experts a token, H hidden, M rows, K columns, F outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine import _products as compiled
from engine.addresses import DTYPES, address_of
from engine.scratch import Scratch

if TYPE_CHECKING:
    from engine.kvcache import PooledLayer
    from engine.layer_shape import LayerShape, Limits
    from engine.shared_expert import SharedExpert


@dataclass(frozen=True, slots=True)
class PromptRoom:
    """What a layer's first call leaves for its second: the residual stream after attention and the same normed, [T, H]
    each; weights [T, k] and index i64 [T, k] of what is chosen. Overwritten by the next layer."""

    middle: Tensor
    normed: Tensor
    weights: Tensor
    index: Tensor

    @classmethod
    def of(cls, shape: LayerShape, tokens: int) -> PromptRoom:
        choice, hidden = shape.choice, shape.block.hidden
        middle, normed = (torch.empty(tokens, hidden, dtype=shape.block.dtype) for _ in range(2))
        top_k, dtype = (0, torch.float32) if choice is None else (choice.top_k, choice.dtype)
        return cls(
            middle, normed, torch.empty(tokens, top_k, dtype=dtype), torch.empty(tokens, top_k, dtype=torch.long)
        )


class Wide:
    """Keeps what its calls use meanwhile, and nothing that they are given."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def multiplies(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `linear` can take these."""
        fitting = weight.stride(1) == 1 and weight.shape[1] % 2 == 0
        return x.is_cpu and x.dtype == weight.dtype == torch.bfloat16 and fitting

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [M, K], `weight` [F, K] with rows in one piece, K even -> [M, F]"""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])  # [M, F]
        self._scratch.run(
            lambda room, size: compiled.wide(
                x.data_ptr(), weight.data_ptr(), address_of(bias), y.data_ptr(), x.shape[0],
                weight.shape[0], weight.shape[1], weight.stride(0), room, size, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y

    def attends(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
        """Whether `attend` can take these, `q` [B, A, S, D]."""
        rows, asking, new, width = q.shape
        alike = q.is_cpu and q.dtype == keys.dtype == values.dtype == torch.bfloat16
        fitting = asking % keys.shape[1] == 0 and len(keys) == len(values) == rows and width % 2 == 0
        in_a_piece = keys.stride(3) == values.stride(3) == 1
        if mask is None:
            return alike and fitting and in_a_piece and new == keys.shape[2]
        return alike and fitting and in_a_piece and self.sees(mask, rows, new, keys.shape[2])

    def sees(self, mask: Tensor, rows: int, new: int, columns: int) -> bool:
        """Whether `mask` is bool [B or 1, 1, S, C] and no token sees columns with others between that it does not."""
        shaped = len(mask) in (1, rows) and tuple(mask.shape[1:]) == (1, new, columns)
        if mask.dtype != torch.bool or not shaped or mask.stride(3) != 1:
            return False
        return compiled.clear(mask.data_ptr(), len(mask), new, columns, mask.stride(0), mask.stride(2))

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """`q` [B, S, A, D], `keys` [B, N, C, D], `values` [B, N, C, V] -> [B, S, A, V].

        `mask` as for `sees`; None: every token sees those before it. `sinks` f32 [A] are scores of which nothing comes.
        A softmax in float32 whose shares are rounded before they weigh values. Neither other rows change what a token
        gets nor columns that it may not see.
        """
        q = q.contiguous()
        rows, new, asking, width = q.shape
        _, heads, columns, value_width = values.shape
        out = q.new_empty(rows, new, asking, value_width)  # [B, S, A, V]
        row, token = _steps(mask, rows)
        steps = [2 * step for step in (*keys.stride()[:3], *values.stride()[:3])]  # bytes
        cache = (
            rows, heads, asking // heads, columns, width, value_width,
            *steps, row,
        )  # fmt: skip
        self._scratch.run(
            lambda room, size: compiled.attend_many(
                q.data_ptr(), keys.data_ptr(), values.data_ptr(), address_of(mask), address_of(sinks), out.data_ptr(),
                scale, new, token, cache, room, size, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out

    def prompt(
        self,
        shape: LayerShape,
        x: Tensor,
        room: PromptRoom,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        cache: PooledLayer,
        limits: Limits | None,
        valid: Tensor | None,
    ) -> None:
        """A decoder layer from its input `x` [B, S, H] to the router's choice, or, without `limits`, to what the router
        would be given. `room` and `limits` are filled, `cache` grows by S columns.

        `positions` are cosines and sines [B or 1, S, R], `mask` as for `sees`. What `valid` bool [T] says is padding
        gets no expert: its index is E.
        """
        rows, new, _ = x.shape
        cos, sin = positions
        keys, values, places = cache.reserve(new)
        row, token = _steps(mask, rows)
        forbidden = (0, 0, 0, 0, 0) if limits is None else limits.addresses
        states = (
            x.data_ptr(), room.middle.data_ptr(), room.normed.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            0 if len(cos) == 1 else cos.stride(0) * cos.itemsize, keys, values, address_of(mask),
            torch.get_num_threads(),
        )  # fmt: skip
        rest = (
            new,
            cos.stride(1) * cos.itemsize,
            token,
            address_of(valid),
            room.index.data_ptr(),
            int(limits is not None),
        )
        routing = (*forbidden, room.weights.data_ptr())
        self._scratch.run(
            lambda here, size: compiled.prompt(
                shape.block.fields, shape.fields, states, (*places, row), routing, (*rest, here, size)
            )
        )

    def ending(
        self,
        y: Tensor,
        index: Tensor,
        nobody: int,
        weights: Tensor,
        x: Tensor,
        shared: SharedExpert | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """`y` f32 [T*k, H] of the experts of `x` [T, H], weighed by `weights` [T, k] and summed in the router's order,
        with what the `shared` one gives, added to `middle` [T, H] -> [T, H]. Choices of which `index` i64 [T, k] is
        `nobody` are left out.
        """
        index = index.contiguous()
        weights = (weights if weights.dtype in DTYPES else weights.float()).contiguous()
        out = torch.empty_like(x)  # [T, H]
        fields = None if shared is None else shared.fields
        tokens, top_k = weights.shape
        self._scratch.run(
            lambda room, size: compiled.ending(
                y.data_ptr(), index.data_ptr(), nobody, weights.data_ptr(), DTYPES[weights.dtype], x.data_ptr(), fields,
                address_of(middle), out.data_ptr(), tokens, top_k, x.shape[1], room, size, torch.get_num_threads(),
            )
        )  # fmt: skip
        return out


def _steps(mask: Tensor | None, rows: int) -> tuple[int, int]:
    """Strides of a mask [B or 1, 1, S, C] from row to row and from token to token; none where one serves all rows."""
    if mask is None:
        return 0, 0
    return (mask.stride(0) if len(mask) == rows else 0), mask.stride(2)
