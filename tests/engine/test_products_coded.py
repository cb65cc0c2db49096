"""Experts whose matrices lie quantised: what the same experts give unpacked, and by their formula."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.addresses import DTYPES
from engine.expert_shape import CLAMPED, ExpertShape, Gate, Scales
from engine.kernels import PAIRS
from engine.products import Products, coding_fields, instruction_sets
from engine.residency import NOBODY
from engine.rounding import rounded
from engine.unpacking import unpack_plainly
from store.quantisation import FP8, GROUP, INT4, MXFP4, WHOLE_ROW, Coding

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

GATES = [Gate(0), Gate(1), Gate(CLAMPED, True, 1.702, 7.0), Gate(CLAMPED, False, 1.702, 7.0)]
CODINGS = [
    Coding(MXFP4, (1, GROUP)), Coding(INT4, (1, GROUP)), Coding(INT4, (1, 64)), Coding(INT4, (1, 128)),
    Coding(INT4, (1, WHOLE_ROW)), Coding(FP8, (128, 128)), Coding(FP8, (64, 64)), Coding(FP8, (7, 24)),
    Coding(FP8, (1, WHOLE_ROW)),
]  # fmt: skip
Views = list[list[Tensor]]


def quantised(coding: Coding, weight: Tensor, part: int, scales_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers u8 and scales; of any block. Every `part` rows by themselves."""
    n, k = weight.shape
    if coding.way == MXFP4:
        return rounded(MXFP4, weight)
    rows, columns = coding.block[0], coding.block[1] or k
    if coding.way == FP8:
        made = [rounded(FP8, piece, (rows, columns)) for piece in weight.split(part)]
        numbers, scales = (torch.cat(each) for each in zip(*made, strict=True))
        return numbers.view(torch.uint8), scales.to(scales_dtype)
    groups = weight.view(n, -1, columns)
    scales = (groups.abs().amax(-1) / 7).to(scales_dtype)
    codes = ((groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7) + 8).to(torch.uint8).view(n, k)
    return codes[:, 0::2] | codes[:, 1::2] << 4, scales


class Banks:
    """The same random experts quantised and as they mean, each in a bank of its own."""

    def __init__(
        self, slots: int, hidden: int, inner: int, gate: Gate, dtype: torch.dtype, *, biased: bool,
        coding: Coding = CODINGS[0], scales_dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        rows = ((2 * inner, hidden), (hidden, inner))
        four: list[list[Tensor]] = []
        wide: list[list[Tensor]] = []
        for _ in range(slots):
            packed, plain = [], []
            for n, k in rows:
                part = inner if n == 2 * inner else n
                blocks, scales = quantised(coding, torch.randn(n, k) * (2 / k**0.5), part, scales_dtype)
                matrix, bias = torch.empty(n, k, dtype=dtype), torch.randn(n).to(dtype)
                unpack_plainly(coding, blocks, scales, matrix, part)
                packed += [blocks, scales, bias]
                plain += [matrix, bias]
            four.append(packed)
            wide.append(plain)
        self.views = wide
        self.four, at = _laid_out(four)
        self.wide, plain_at = _laid_out(wide)
        up, up_scales, up_bias, down, down_scales, down_bias = at
        head = (DTYPES[dtype], 1, hidden, inner)
        biases = (up_bias, down_bias) if biased else (-1, -1)
        read = coding_fields(coding, four[0][1].dtype)
        self.packed = ExpertShape(
            (*head, self.four.shape[1], up, biases[0], down, biases[1]), dtype, gate,
            scales=Scales(up_scales, down_scales, read, inner),
        )  # fmt: skip
        biases = (plain_at[1], plain_at[3]) if biased else (-1, -1)
        self.plain = ExpertShape(
            (*head, self.wide.shape[1], plain_at[0], biases[0], plain_at[2], biases[1]), dtype, gate
        )


def _laid_out(experts: list[list[Tensor]]) -> tuple[Tensor, list[int]]:
    """A bank u8 [S, slot_bytes], and where an expert's parts begin."""
    places, end = [], 0
    for part in experts[0]:
        places.append(end)
        end += -(-part.nbytes // 64) * 64
    bank = torch.zeros(len(experts), end, dtype=torch.uint8)
    for row, parts in zip(bank, experts, strict=True):
        for at, part in zip(places, parts, strict=True):
            row[at : at + part.nbytes] = part.flatten().view(torch.uint8)
    return bank, places


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("hidden", "inner"), [(32, 64), (96, 32), (544, 160)])
def test_they_give_what_they_give_unpacked(
    hidden: int, inner: int, biased: bool, gate: Gate, dtype: torch.dtype, own: Products, threads: Callable[[int], None]
) -> None:
    """To the bit, in any number of threads, few tokens and many; where the processor multiplies bfloat16 itself, in
    another order of sums for few."""
    rng = random.Random(hidden)
    both_ways(Banks(5, hidden, inner, gate, dtype, biased=biased), hidden, dtype, own, rng, threads)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("coding", CODINGS[1:])
@pytest.mark.parametrize(("hidden", "inner"), [(128, 256), (384, 128), (640, 640)])
@pytest.mark.parametrize("scales_dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_so_do_integers_and_eight_bit_floats(
    scales_dtype: torch.dtype, hidden: int, inner: int, coding: Coding, dtype: torch.dtype, own: Products,
    threads: Callable[[int], None],
) -> None:  # fmt: skip
    """Whatever shares a scale, and whatever scales are stored as."""
    if coding.way == FP8 and scales_dtype == torch.float16:
        return  # no layout has them
    rng = random.Random(hidden)
    banks = Banks(5, hidden, inner, GATES[0], dtype, biased=True, coding=coding, scales_dtype=scales_dtype)
    both_ways(banks, hidden, dtype, own, rng, threads)


def both_ways(
    banks: Banks, hidden: int, dtype: torch.dtype, own: Products, rng: random.Random, threads: Callable[[int], None]
) -> None:  # fmt: skip
    for tokens in (1, 2, 7, 16, 90):
        threads(rng.choice([1, 2]))
        x = torch.randn(tokens, hidden).to(dtype)
        slots = [rng.choice([0, 1, 2, 3, 3, 4, NOBODY]) for _ in range(tokens * 2)]
        found, wanted = torch.zeros(2, tokens * 2, hidden)
        if tokens <= 16:
            own.experts(banks.packed, banks.four, x, slots, found)
            own.experts(banks.plain, banks.wide, x, slots, wanted)
            same(own, dtype, found, wanted)
        chosen = torch.tensor(slots).view(tokens, 2)
        many, plain = torch.zeros(2, tokens * 2, hidden)
        own.many(banks.packed, banks.four, x, chosen, many)
        own.many(banks.plain, banks.wide, x, chosen, plain)
        same(own, dtype, many, plain)


def same(own: Products, dtype: torch.dtype, found: Tensor, wanted: Tensor) -> None:
    if own.instruction_set != PAIRS or dtype == torch.float32:
        assert found.equal(wanted)
        return
    most = wanted.abs().amax(1, keepdim=True)
    assert ((found - wanted).abs() <= 2e-2 * most + 1e-6).all()  # inner numbers are rounded to bfloat16


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("hidden", "inner"), [(128, 64), (256, 384), (2688, 64)])
def test_a_token_gets_to_the_bit_what_it_gets_alone(
    hidden: int, inner: int, coding: Coding, dtype: torch.dtype, own: Products, threads: Callable[[int], None]
) -> None:
    """Whatever other tokens and experts are computed beside it, in any number of threads, and of many by few."""
    if coding.block == (1, 128) and inner % 128:
        return  # rows that are no whole groups
    banks = Banks(4, hidden, inner, GATES[2], dtype, biased=True, coding=coding)
    x = torch.randn(16, hidden).to(dtype)
    slots = random.choices(range(4), [6, 2, 1, 1], k=16)
    whole, alone, many = torch.zeros(3, 16, hidden)
    threads(2)
    own.experts(banks.packed, banks.four, x, slots, whole)
    own.many(banks.packed, banks.four, x, torch.tensor(slots).view(16, 1), many)
    threads(1)
    for token in range(16):
        own.experts(banks.packed, banks.four, x[token : token + 1], [slots[token]], alone[token : token + 1])
    assert alone.equal(whole)
    if own.instruction_set == PAIRS and dtype == torch.bfloat16 and inner == 64:
        few = [slots.count(slot) <= 8 for slot in slots]
        assert many[few].equal(whole[few])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("gate", GATES)
def test_many_tokens_get_what_the_gates_formula_says(gate: Gate, dtype: torch.dtype, own: Products) -> None:
    banks = Banks(3, 64, 32, gate, dtype, biased=True)
    x = torch.randn(70, 64).to(dtype)
    slots = torch.randint(0, 3, (70, 1))
    found = torch.zeros(70, 64)
    own.many(banks.packed, banks.four, x, slots, found)
    for token in range(70):
        up, up_bias, down, down_bias = (part.double() for part in banks.views[int(slots[token, 0])])
        wanted = F.linear(gate(F.linear(x[token].double(), up, up_bias)), down, down_bias)
        tolerance = 1e-4 if dtype == torch.float32 else 3e-2
        assert (found[token].double() - wanted).abs().max() <= tolerance * (1 + wanted.abs().max())
