"""Experts whose matrices lie in four bits: what the same experts give unpacked, and by their formula."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.expert_shape import CLAMPED, ExpertShape, Gate
from engine.kernels import PAIRS
from engine.mxfp4 import quantise, unpack_plainly
from engine.products import DTYPES, Products, instruction_sets
from engine.residency import NOBODY

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

GATES = [Gate(0), Gate(1), Gate(CLAMPED, True, 1.702, 7.0), Gate(CLAMPED, False, 1.702, 7.0)]
Views = list[list[Tensor]]


class Banks:
    """The same random experts in four bits and as they mean, each in a bank of its own."""

    def __init__(self, slots: int, hidden: int, inner: int, gate: Gate, dtype: torch.dtype, *, biased: bool) -> None:
        rows = ((2 * inner, hidden), (hidden, inner))
        four: list[list[Tensor]] = []
        wide: list[list[Tensor]] = []
        for _ in range(slots):
            packed, plain = [], []
            for n, k in rows:
                blocks, scales = quantise(torch.randn(n, k) * (2 / k**0.5))
                matrix, bias = torch.empty(n, k, dtype=dtype), torch.randn(n).to(dtype)
                unpack_plainly(blocks, scales, matrix)
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
        self.packed = ExpertShape(
            (*head, self.four.shape[1], up, biases[0], down, biases[1]), dtype, gate, scales=(up_scales, down_scales)
        )
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
    banks, rng = Banks(5, hidden, inner, gate, dtype, biased=biased), random.Random(hidden)
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
@pytest.mark.parametrize(("hidden", "inner"), [(32, 64), (160, 288), (2880, 64)])
def test_a_token_gets_to_the_bit_what_it_gets_alone(
    hidden: int, inner: int, dtype: torch.dtype, own: Products, threads: Callable[[int], None]
) -> None:
    """Whatever other tokens and experts are computed beside it, in any number of threads, and of many by few."""
    banks = Banks(4, hidden, inner, GATES[2], dtype, biased=True)
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
