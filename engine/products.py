"""Our own matrix products of few rows, compiled from products.c at install: weights are read once, at memory's speed.
And experts that are too small for a call of torch's each, for any number of tokens (products_many.h).

Hands addresses of tensors to C; decides nothing about when they are used, that is engine.kernels. Where the extension
was not built (no C compiler at install) there are none, and `missing` says so.

T tokens, k experts a token, H hidden, F an expert's inner width, M rows, K columns, N outputs. Of attention: B rows, S
columns of the cache, D and V the width of a key and of a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.addresses import DTYPES, address_of
from engine.scratch import Scratch
from store.quantisation import FP8, INT4, MXFP4, Coding

if TYPE_CHECKING:
    from engine.block_shape import BlockShape
    from engine.expert_shape import ExpertShape
    from engine.kvcache import PooledLayer
    from engine.layer_shape import LayerShape, Limits, Room
    from engine.shared_expert import SharedExpert

try:  # after torch, whose OpenMP runtime it then shares
    from engine import _products as compiled
except ImportError as error:  # built with `optional`: an install without a C compiler goes without it
    compiled = None  # type: ignore[assignment]
    missing = f"not built at install ({error})"
else:
    missing = "" if hasattr(compiled, "scan") else "built from older sources"
    from engine.wide import Wide

STORED: Mapping[torch.dtype, int] = {**DTYPES, torch.float16: 2, torch.float8_e4m3fn: 3}  # the last two are only read
CONVERTED = frozenset({  # what is stored, and what is served; halves to float32 torch makes as fast
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e4m3fn, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.bfloat16),
})  # fmt: skip


PAIRS = "AVX-512 BF16"  # the instruction set that multiplies bfloat16 itself
WIDE = frozenset({PAIRS, "AVX-512", "AVX2"})  # for which many rows were measured
WAYS: Mapping[str, int] = {MXFP4: 1, INT4: 2, FP8: 3}
EXPONENTS = 4  # what the scales of MXFP4 are


def coding_fields(coding: Coding, scales: torch.dtype) -> tuple[int, int, int, int]:
    """Those of `struct coding`."""
    return WAYS[coding.way], EXPONENTS if coding.way == MXFP4 else STORED[scales], *coding.block


def instruction_sets() -> Mapping[str, int]:
    """Those of this processor that the loops were compiled for, the best first; none where nothing was built."""
    return {} if missing else compiled.sets()


def bfloat16_in_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (AMX; x86 alone is asked): torch does, our loops do not."""
    return not missing and compiled.tiles()


class Products:
    """The compiled loops for one instruction set. Tensors are on the CPU, in float32 or bfloat16."""

    def __init__(self, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._set = instruction_sets()[instruction_set]
        self.scratch = Scratch()
        # Many rows of bfloat16 are torch's where the processor has tiles of them.
        self._takes_many = instruction_set in WIDE and not bfloat16_in_tiles()
        self.wide = Wide(self.scratch) if instruction_set == PAIRS and self._takes_many else None

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x` [M, K], `weight` [N, K] with rows in one piece -> [M, N]"""
        x = x.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])  # [M, N]
        compiled.product(
            self._set, DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
            y.data_ptr(), x.shape[0], weight.shape[0], weight.shape[1], weight.stride(0), torch.get_num_threads(),
        )  # fmt: skip
        return y

    def multiplies_many(self, x: Tensor, weight: Tensor) -> bool:
        """Whether `linear_many` can take these, and torch is no faster. In float32 that was not found out: how fast
        torch's library is depends on who made the processor."""
        if self.wide is not None:
            return self.wide.multiplies(x, weight)
        alike = x.is_cpu and x.dtype == weight.dtype == torch.bfloat16
        return self._takes_many and alike and weight.is_contiguous()

    def linear_many(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `linear` for many rows, which lie across lanes: `x` [M, K], `weight` [N, K] -> [M, N]. A row
        is the same whatever rows are beside it."""
        if self.wide is not None and self.wide.multiplies(x, weight):
            return self.wide.linear(x, weight, bias)
        x, weight = x.contiguous(), weight.contiguous()
        y = x.new_empty(x.shape[0], weight.shape[0])  # [M, N]
        self.scratch.run(
            lambda room, size: compiled.product_many(
                self._set, DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), address_of(bias), y.data_ptr(), x.shape[0],
                weight.shape[0], weight.shape[1], room, size, torch.get_num_threads(),
            )
        )  # fmt: skip
        return y

    def experts(self, shape: ExpertShape, bank: Tensor, x: Tensor, slots: list[int], y: Tensor) -> None:
        """`x` [T, H], a slot for each of T*k choices -> their unweighted outputs into `y` f32 [T*k, H].

        `bank` u8 [S, slot_bytes]. A choice without a slot (a negative number) leaves `y` as it was.
        """
        compiled.experts(
            self._set, shape.fields, bank.data_ptr(), x.data_ptr(), len(x), len(slots) // len(x), slots, y.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip

    def many(self, shape: ExpertShape, bank: Tensor, x: Tensor, slots: Tensor, y: Tensor) -> None:
        """The same for many tokens: `slots` i64 [T, k], `y` f32 [T*k, H]. Weights are read once for many rows.

        What an expert makes of a token depends on nothing else in the call; `experts` gives the same but for rounding.
        """
        assert x.is_contiguous(), x.stride()
        assert slots.is_contiguous(), slots.stride()
        self.scratch.run(
            lambda room, size: compiled.many(
                self._set, shape.fields, bank.data_ptr(), len(bank), x.data_ptr(), len(x), slots.shape[1],
                slots.data_ptr(), y.data_ptr(), room, size, torch.get_num_threads(),
            )
        )  # fmt: skip

    def combine(self, y: Tensor, slots: list[int], weights: Tensor, dtype: torch.dtype) -> Tensor:
        """`y` f32 [T*k, H], `weights` [T, k] -> [T, H]: summed in the router's order; negative slots are left out."""
        tokens, hidden = weights.shape[0], y.shape[1]
        weights = (weights if weights.dtype in DTYPES else weights.float()).contiguous()
        out = y.new_empty(tokens, hidden, dtype=dtype)  # [T, H]
        compiled.combine(
            y.data_ptr(),
            slots,
            weights.data_ptr(),
            DTYPES[weights.dtype],
            out.data_ptr(),
            DTYPES[dtype],
            tokens,
            hidden,
        )
        return out

    def attend(
        self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None
    ) -> Tensor:
        """One new token a row: `q` [B, A, D], `keys` [B, N, S, D], `values` [B, N, S, V] -> [B, A, V].

        A heads of which A/N neighbours share one of the N of the cache; `mask` bool [B or 1, S] says where a row may
        look, None everywhere. `sinks` f32 [A] are scores of which nothing comes. Softmax and sums are in float32, in an
        order that neither other rows change nor columns that a row may not see.
        """
        q = q.contiguous()
        rows, asking, width = q.shape
        _, heads, columns, value_width = values.shape
        out = q.new_empty(rows, asking, value_width)  # [B, A, V]
        mask_row = 0 if mask is None or mask.shape[0] == 1 else mask.stride(0)
        key_row, key_head, key_column = (q.itemsize * step for step in keys.stride()[:3])
        value_row, value_head, value_column = (q.itemsize * step for step in values.stride()[:3])
        compiled.attend(
            self._set, DTYPES[q.dtype], q.data_ptr(), keys.data_ptr(), values.data_ptr(),
            0 if mask is None else mask.data_ptr(), address_of(sinks), out.data_ptr(), scale, torch.get_num_threads(),
            (rows, heads, asking // heads, columns, width, value_width,
             key_row, key_head, key_column, value_row, value_head, value_column, mask_row),
        )  # fmt: skip
        return out

    def block(
        self,
        shape: BlockShape,
        x: Tensor,
        positions: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention from input to output projection for one new token a row: `x` [B, 1, H] -> [B, 1, H].

        `positions` are cosines and sines [B or 1, 1, R]; the last column of `cache`, keys and values [B, N, S, D], is
        written and then seen; `mask` bool [B or 1, 1, 1, S] says where a row may look, None everywhere.
        """
        x = x.contiguous()
        cos, sin = (one.contiguous() for one in positions)
        keys, values = cache
        y = torch.empty_like(x)  # [B, 1, H]
        size = x.itemsize
        key_row, key_head, key_column = (size * step for step in keys.stride()[:3])
        value_row, value_head, value_column = (size * step for step in values.stride()[:3])
        compiled.block(
            self._set, shape.fields, x.data_ptr(), y.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            0 if len(cos) == 1 else cos.shape[-1] * cos.itemsize, keys.data_ptr(), values.data_ptr(),
            0 if mask is None else mask.data_ptr(), torch.get_num_threads(),
            (len(x), shape.kv_heads, keys.shape[2], key_row, key_head, key_column, value_row, value_head, value_column,
             0 if mask is None or len(mask) == 1 else mask.stride(0)),
        )  # fmt: skip
        return y

    def layer(
        self,
        shape: LayerShape,
        x: Tensor,
        room: Room,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        cache: PooledLayer,
        limits: Limits,
    ) -> list[int] | None:
        """A decoder layer from its input `x` [B, 1, H] to the router's choice: B*k experts, the likeliest of a row
        first; None where the shape has no router. `room` and `limits` are filled, `cache` grows by a column.

        `positions` and `mask` as for `block`.
        """
        cos, sin = positions
        position_row = 0 if len(cos) == 1 else cos.stride(0) * cos.itemsize
        keys, values, places = cache.reserve()
        middle, normed, weights = room.addresses
        chosen: list[int] | None = compiled.layer(
            self._set, shape.block.fields, shape.fields,
            (x.data_ptr(), middle, normed, cos.data_ptr(), sin.data_ptr(), position_row,
             keys, values, 0 if mask is None else mask.data_ptr(), torch.get_num_threads()),
            (*places, 0 if mask is None or len(mask) == 1 else mask.stride(0)),
            (*limits.addresses, weights),
        )  # fmt: skip
        return chosen

    def onto(
        self, shape: ExpertShape, bank: Tensor, room: Room, slots: list[int], shared: SharedExpert | None
    ) -> Tensor:
        """A decoder layer's end: its chosen experts, in `slots` of `bank` as for `experts`, and the one that every
        token goes to, added to the residual stream, [B, 1, H].
        """
        middle, normed, weights = room.addresses
        rows, out = len(room.middle), torch.empty_like(room.middle)  # [B, 1, H]
        compiled.onto(
            self._set, shape.fields, bank.data_ptr(), normed, rows, len(slots) // rows, slots, weights,
            DTYPES[room.weights.dtype], None if shared is None else shared.fields, middle, out.data_ptr(),
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def shared(self, shared: SharedExpert, x: Tensor) -> Tensor:
        """What a shared expert adds to the chosen ones, `x` [T, H] -> [T, H]: bit for bit what `onto` adds."""
        x = x.contiguous()
        out = torch.empty_like(x)  # [T, H]
        compiled.shared(self._set, shared.fields, x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads())
        return out

    def delta(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, least: float
    ) -> Tensor:  # fmt: skip
        """The gated delta rule, token by token: `q`, `k` [B, S, N, D], `v` [B, S, A, V], logarithms of decay `g`
        [B, S, A], or [B, S, A, D] for each number of a key, and `beta` [B, S, A] -> [B, S, A, V].

        A/N neighbours share a key. `state` f32 [B, A, D, V] is written over. q and k are divided by their lengths, to
        whose squares `least` is added, q by the root of D as well. Of each row in an order that nothing else changes.
        """
        q, k, v = (each if _heads_in_a_piece(each) else each.contiguous() for each in (q, k, v))
        g, beta = g.float().contiguous(), beta.float().contiguous()
        rows, tokens, key_heads, width = k.shape
        out = v.new_empty(v.shape)  # [B, S, A, V]
        compiled.delta(
            self._set, DTYPES[v.dtype], int(g.dim() == 4), q.data_ptr(), k.data_ptr(), v.data_ptr(), g.data_ptr(),
            beta.data_ptr(), state.data_ptr(), out.data_ptr(),
            (rows, tokens, key_heads, v.shape[2], width, v.shape[3]),
            (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]), width**-0.5, least, torch.get_num_threads(),
        )  # fmt: skip
        return out

    def scan(
        self, x: Tensor, k: Tensor, q: Tensor, steps: Tensor, fading: Tensor, skip: Tensor | None, state: Tensor
    ) -> Tensor:  # fmt: skip
        """A state space, token by token: `x` [B, S, A, P], `k` and `q` [B, S, G, N], which A/G neighbours share,
        `steps` f32 [B, S, A], `fading` and `skip` [A] -> f32 [B, S, A, P].

        `state` f32 [B, A, P, N] is written over. Of each row in an order that nothing else changes.
        """
        x, k, q = (each if _heads_in_a_piece(each) else each.contiguous() for each in (x, k, q))
        steps, fading = steps.contiguous(), fading.float().contiguous()
        skip = None if skip is None else skip.float().contiguous()
        rows, tokens, groups, keys = k.shape
        out = x.new_empty(x.shape, dtype=torch.float32)  # [B, S, A, P]
        compiled.scan(
            self._set, DTYPES[x.dtype], x.data_ptr(), k.data_ptr(), q.data_ptr(), steps.data_ptr(), fading.data_ptr(),
            address_of(skip), state.data_ptr(), out.data_ptr(), (rows, tokens, groups, *x.shape[2:], keys),
            (*x.stride()[:2], *k.stride()[:2], *q.stride()[:2]), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool) -> Tensor:
        """Each channel of `x` [B, S, C] by itself: the last W tokens times `weight` [C, W], `bias` [C] -> [B, S, C].

        Before the first token are zeros. Rounded before silu, if that is wanted, and after it.
        """
        x = x if x.stride(2) == 1 else x.contiguous()
        rows, tokens, channels = x.shape
        out = x.new_empty(x.shape)  # [B, S, C]
        compiled.convolve(
            self._set, DTYPES[x.dtype], int(silu), x.data_ptr(), weight.data_ptr(), address_of(bias), out.data_ptr(),
            (rows, tokens, channels, weight.shape[1]), x.stride(0), x.stride(1), torch.get_num_threads(),
        )  # fmt: skip
        return out

    def convolve_step(
        self, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None, *, silu: bool
    ) -> Tensor:  # fmt: skip
        """The same for one token a row, `x` [B, C], after the K that `state` [B, C, K] keeps, which moves on by it."""
        x = x.contiguous()
        out = torch.empty_like(x)  # [B, C]
        compiled.convolve_step(
            self._set, DTYPES[x.dtype], int(silu), x.data_ptr(), state.data_ptr(), weight.data_ptr(), address_of(bias),
            out.data_ptr(), (*state.shape, weight.shape[1]),
        )  # fmt: skip
        return out

    def convert(
        self, stored: Tensor, target: Tensor, scales: Tensor | None = None, block: tuple[int, int] = (1, 1)
    ) -> None:
        """`stored` [N, K], in one piece, into `target` [N, K] of another dtype, rounded once. FP8 is multiplied by
        `scales` [ceil(N / n), ceil(K / k)], `block` being (n, k). Waits for nobody who holds the interpreter.
        """
        rows, columns = stored.shape
        scales_dtype = 0 if scales is None else DTYPES[scales.dtype]
        to_row, to_column = target.stride()
        block_rows, block_columns = (max(1, rows), max(1, columns)) if scales is None else block
        compiled.convert(
            self._set, STORED[stored.dtype], stored.data_ptr(), scales_dtype, address_of(scales),
            DTYPES[target.dtype], target.data_ptr(), rows, columns, to_row, to_column, block_rows, block_columns,
            torch.get_num_threads(),
        )  # fmt: skip

    def unpack(self, coding: Coding, numbers: Tensor, scales: Tensor, target: Tensor, part: int) -> None:
        """Quantised weights (store/quantised.py), `numbers` u8 [N, bytes of a row] and their `scales`, into `target`
        [N, K]; every `part` rows were quantised by themselves."""
        assert all(tensor.is_contiguous() for tensor in (numbers, scales, target)), numbers.stride()
        rows, columns = target.shape
        compiled.unpack(
            self._set, DTYPES[target.dtype], numbers.data_ptr(), scales.data_ptr(), coding_fields(coding, scales.dtype),
            part, target.data_ptr(), rows, columns, torch.get_num_threads(),
        )  # fmt: skip

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Each row of `x` [..., K] by its root mean square, times `weight` [K] of the same dtype."""
        x = x.contiguous()
        y = torch.empty_like(x)  # [..., K]
        columns = weight.shape[0]
        compiled.norm(
            DTYPES[x.dtype], x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // columns, columns, eps
        )
        return y


def of_one_kind(first: Tensor, *others: Tensor) -> bool:
    """Whether all are of the one dtype, that ours take, and on the CPU."""
    return first.is_cpu and first.dtype in DTYPES and all(each.dtype == first.dtype for each in others)


def _heads_in_a_piece(x: Tensor) -> bool:
    """Of [B, S, heads, width], whether a token's numbers follow each other."""
    return x.stride()[2:] == (x.shape[3], 1)


def converts(stored: torch.dtype, served: torch.dtype) -> bool:
    """Whether `Products.convert` makes the one into the other, on the host."""
    return not missing and (stored, served) in CONVERTED


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `Products.linear` can take these."""
    return of_one_kind(x, weight) and weight.stride(1) == 1


def attends(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether `Products.attend` can take these, `q` [B, A, 1, D] and `mask` [B or 1, 1, 1, S]."""
    rows, asking, new, _ = q.shape
    fitting = new == 1 and asking % keys.shape[1] == 0 and len(keys) == len(values) == rows
    in_a_piece = keys.stride(3) == values.stride(3) == 1
    return (
        fitting
        and of_one_kind(q, keys, values)
        and in_a_piece
        and (mask is None or shows_columns(mask, rows, keys.shape[2]))
    )


def shows_columns(mask: Tensor, rows: int, columns: int) -> bool:
    """Whether `mask` is bool [B or 1, 1, 1, S], as for one new token."""
    shared = mask.shape[0] in (1, rows) and tuple(mask.shape[1:]) == (1, 1, columns)
    return mask.dtype == torch.bool and shared and mask.stride(3) == 1
