"""Experts that lie transposed or have a gate of their own: found out, and computed as their formula says."""

from __future__ import annotations

import random
from collections.abc import Callable
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.addresses import DTYPES
from engine.engine import Engine
from engine.expert_shape import CLAMPED, ExpertShape, Gate
from engine.products import Products, instruction_sets
from engine.residency import NOBODY

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

OSS, HALVES = Gate(CLAMPED, True, 1.702, 7.0), Gate(CLAMPED, False, 1.702, 7.0)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize(
    ("family", "gate", "across"),
    [
        ("olmoe", Gate(0), False),
        ("beam", Gate(0), False),
        ("minimax_m3_vl_text", HALVES, False),
        ("gpt_oss", OSS, True),
    ],
)
def test_a_familys_gate_is_found_by_trying_it(
    family: str,
    gate: Gate,
    across: bool,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
) -> None:
    engine = open_engine(checkpoint(family), kernel="own")
    shapes = [paged.compiled.shape for paged in engine.passes._experts]  # type: ignore[union-attr]
    assert {(shape.gate, shape.across, shape.packed) for shape in shapes} == {(gate, across, False)}


def module(gate: Callable[[Tensor], Tensor], **attributes: float) -> Any:
    return SimpleNamespace(has_gate=True, act_fn=torch.nn.SiLU(), _apply_gate=gate, **attributes)


def test_a_gate_that_nobody_knows_is_not_taken_for_another() -> None:
    usual, clamped = Gate(0), Gate(CLAMPED, False, 1.5, 50.0)
    assert Gate.of(module(usual)) == usual
    assert Gate.of(module(clamped, alpha=1.5, limit=50.0)) == clamped
    unknown: list[Any] = [
        module(lambda x: usual(x) * 1.01),
        module(lambda x: usual(x.clamp(max=40.0)), limit=40.0),  # seen by inputs beyond the limit alone
        module(lambda x: clamped(x) - 0.01, alpha=1.5, limit=50.0),
        module(clamped, limit=50.0),
        module(lambda x: x),
    ]
    assert {Gate.of(each) for each in unknown} == {"a gate of its own"}


def random_experts(
    slots: int, hidden: int, inner: int, dtype: torch.dtype
) -> tuple[Tensor, list[Any], tuple[int, ...]]:
    """A bank of transposed experts with biases, their parameters, and the places of these."""
    shapes = [(hidden, 2 * inner), (2 * inner,), (inner, hidden), (hidden,)]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    offsets = [sum(sizes[:at]) for at in range(4)]
    bank = torch.zeros(slots, -(-sum(sizes) // 64) * 64, dtype=torch.uint8)
    views = [
        [row[at : at + size].view(dtype).view(shape) for at, size, shape in zip(offsets, sizes, shapes, strict=True)]
        for row in bank
    ]
    for part in (part for parts in views for part in parts):
        part.copy_(torch.randn(part.shape) * (3 / part.shape[0] ** 0.5))  # so that limits are reached
    return bank, views, (DTYPES[dtype], 1, hidden, inner, bank.shape[1], *offsets)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("gate", [OSS, HALVES, Gate(0), Gate(1)])
@pytest.mark.parametrize(("hidden", "inner"), [(37, 21), (64, 48), (130, 9)])
def test_transposed_experts_are_those_of_float64(
    hidden: int, inner: int, gate: Gate, dtype: torch.dtype, own: Products
) -> None:
    bank, views, places = random_experts(5, hidden, inner, dtype)
    shape, rng = ExpertShape(places, dtype, gate, across=True), random.Random(hidden)  # type: ignore[arg-type]
    for tokens in (1, 2, 3, 7, 16):
        x = torch.randn(tokens, hidden).to(dtype)
        slots = [rng.choice([0, 1, 2, 3, 4, NOBODY]) for _ in range(tokens * 3)]
        found = torch.zeros(tokens * 3, hidden)
        own.experts(shape, bank, x, slots, found)
        for choice, slot in enumerate(slots):
            wanted = torch.zeros(hidden, dtype=torch.float64)
            if slot != NOBODY:
                up, up_bias, down, down_bias = (part.double() for part in views[slot])
                wanted = gate(x[choice // 3].double() @ up + up_bias) @ down + down_bias
            error = (found[choice].double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_their_bits_depend_neither_on_other_tokens_nor_on_threads(
    dtype: torch.dtype, own: Products, threads: Callable[[int], None]
) -> None:
    bank, _, places = random_experts(2, 401, 333, dtype)  # enough bytes for threads, and no whole vectors
    shape, x = ExpertShape(places, dtype, OSS, across=True), torch.randn(7, 401).to(dtype)  # type: ignore[arg-type]
    threads(1)
    whole = torch.zeros(7, 401)
    own.experts(shape, bank, x, [1] * 7, whole)
    for rows in (1, 2, 3):
        for row in range(8 - rows):
            alone = torch.zeros(rows, 401)
            own.experts(shape, bank, x[row : row + rows].contiguous(), [1] * rows, alone)
            assert alone.equal(whole[row : row + rows])
    for count in (2, 3):
        threads(count)
        again = torch.zeros(7, 401)
        own.experts(shape, bank, x, [1] * 7, again)
        assert again.equal(whole)


def test_clamped_gates_are_right_far_from_zero_and_no_number_stays_none(own: Products) -> None:
    """A single expert of one number in and one out whose gate and up are that number."""
    x = torch.tensor([-1e30, -100.0, -7.0, -1e-30, 0.0, 0.3, 6.9, 7.1, 90.0, 1e30, torch.nan])
    for gate in (OSS, HALVES, Gate(CLAMPED, True, 1.0, inf)):
        bank = torch.ones(16, dtype=torch.float32).view(torch.uint8).view(1, -1)
        shape = ExpertShape((0, 1, 1, 1, bank.shape[1], 0, -1, 16, -1), torch.float32, gate, across=True)
        found = torch.zeros(len(x), 1)
        own.experts(shape, bank, x.unsqueeze(1), [0] * len(x), found)
        wanted = gate(x.double().unsqueeze(1).expand(-1, 2)).float()
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_gates_halve_what_they_are_given() -> None:
    x = torch.randn(3, 10)
    assert Gate(0)(x).equal(F.silu(x[:, :5]) * x[:, 5:])
    assert Gate(CLAMPED, True, 1.0, inf)(x).shape == (3, 5)
