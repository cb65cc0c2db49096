"""Stored weights in one call: every bit as torch makes it, on every instruction set, wherever they are to lie."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine import conversion
from engine.conversion import convert, convert_fp8, needs_scratch
from engine.fp8 import dequantise
from engine.products import Products, instruction_sets

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

FP8 = torch.float8_e4m3fn
SERVED = [torch.float32, torch.bfloat16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@pytest.fixture(params=list(instruction_sets()), autouse=True)
def own(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Products:
    """What converts, whatever this processor's best set is."""
    chosen = Products(request.param)
    monkeypatch.setattr(conversion, "_own", lambda: chosen)
    return chosen


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Of numbers; what is none may be none in other bits, as torch's own loops have it."""
    bits = BITS[wanted.dtype]
    equal = found.contiguous().view(bits) == wanted.contiguous().view(bits)
    return bool((equal | (found.isnan() & wanted.isnan())).all())


def all_codes(rows: int, columns: int) -> Tensor:
    """FP8 [rows, columns] of all 256 codes, shuffled: zeros of both signs, the smallest, the largest, no numbers."""
    count = rows * columns
    codes = torch.arange(256, dtype=torch.uint8).repeat(-(-count // 256))[:count]
    return codes[torch.randperm(count)].view(FP8).view(rows, columns)


def scales_of(rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """f32, of either sign and of any size, so that products overflow, vanish, and leave the normal range."""
    shape = -(-rows // block[0]), -(-columns // block[1])
    return torch.randn(shape) * 10.0 ** torch.randint(-42, 38, shape)


@pytest.mark.parametrize("served", SERVED)
@pytest.mark.parametrize("block", [(128, 128), (8, 5), (1, 3), (200, 1)])
def test_fp8_times_scales_is_torchs_to_the_bit(served: torch.dtype, block: tuple[int, int]) -> None:
    for rows, columns in ((1, 1), (7, 4), (130, 257), (129, 16), (3, 515)):
        stored, scales = all_codes(rows, columns), scales_of(rows, columns, block)
        for kept in (scales, scales.bfloat16()):
            found, wanted = torch.empty(2, rows, columns, dtype=served)
            convert_fp8(stored, kept, block, found)
            dequantise(stored, kept, block, wanted)
            assert same_bits(found, wanted)


@pytest.mark.parametrize("served", SERVED)
def test_every_code_means_what_torch_says(served: torch.dtype) -> None:
    stored = torch.arange(256, dtype=torch.uint8).view(FP8).view(16, 16)
    target = torch.empty(16, 16, dtype=served)
    convert_fp8(stored, torch.ones(1, 1), (16, 16), target)
    assert same_bits(target, stored.to(served))
    assert target.isnan().sum() == 2


def test_every_half_float_means_what_torch_says() -> None:
    stored = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    for served in SERVED:
        target = torch.empty(2**16, dtype=served)
        convert(stored, target)
        assert same_bits(target, stored.to(served))


def test_floats_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    """Every upper half there is, with lower halves just below a tie, at it, above it, and at random."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, random.randrange(2**16)):
        stored = (upper | lower).view(torch.float32)
        target = torch.empty(2**16, dtype=torch.bfloat16)
        convert(stored, target)
        assert same_bits(target, stored.bfloat16())


@pytest.mark.parametrize("served", SERVED)
def test_it_lands_in_the_middle_of_a_wider_matrix_and_across_another_and_touches_nothing_else(
    served: torch.dtype,
) -> None:
    stored, block = all_codes(19, 37), (8, 5)
    scales = scales_of(19, 37, block)
    wanted = torch.empty(19, 37, dtype=served)
    dequantise(stored, scales, block, wanted)
    for held, target in (
        (wide := torch.full((25, 80), 7.0, dtype=served), wide[3:22, 11:48]),
        (tall := torch.full((41, 23), 7.0, dtype=served), tall[2:39, 4:23].t()),
    ):
        convert_fp8(stored, scales, block, target)
        assert same_bits(target, wanted)
        target.fill_(7.0)
        assert held.eq(7.0).all()
        for plain in (torch.randn(19, 37).half(), torch.randn(19, 37)):
            convert(plain, target)
            assert same_bits(target, plain.to(served))


def test_parts_of_any_number_of_dimensions_are_converted() -> None:
    for shape in ((), (5,), (2, 3, 4), (0, 4)):
        stored, target = torch.randn(shape), torch.empty(shape, dtype=torch.bfloat16)
        convert(stored, target)
        assert same_bits(target, stored.bfloat16())
    stored, scales, both = all_codes(9, 6), scales_of(9, 6, (4, 4)), torch.empty(2, 9, 6)
    convert_fp8(torch.stack([stored, stored]), torch.stack([scales, -scales]), (4, 4), both)
    assert same_bits(both[0], -both[1])


def test_what_is_ours_is_done_without_torch_and_the_rest_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.dtype] = []
    real = Products.convert

    def counted(own: Products, stored: Tensor, target: Tensor, *rest: object) -> None:
        calls.append(target.dtype)
        real(own, stored, target, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Products, "convert", counted)
    x, scales = torch.randn(4, 4), torch.ones(1, 1)
    for served in (torch.bfloat16, torch.float32, torch.float16, torch.float64):
        target = torch.empty(4, 4, dtype=served)
        convert(x, target)
        assert target.equal(x.to(served))
        convert_fp8(x.to(FP8), scales, (4, 4), target)
        assert target.equal(x.to(FP8).to(served))
    assert calls == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert [needs_scratch(served, on_host=True) for served in (*SERVED, torch.float16)] == [False, False, True]
    assert needs_scratch(torch.bfloat16, on_host=False)


def test_threads_change_nothing() -> None:
    stored = all_codes(700, 1000)  # worth several threads
    scales, before = scales_of(700, 1000, (128, 128)), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(torch.empty(700, 1000, dtype=torch.bfloat16))
        convert_fp8(stored, scales, (128, 128), found[-1])
    torch.set_num_threads(before)
    assert same_bits(*found)


def test_nobody_who_wants_the_interpreter_waits_for_it(own: Products) -> None:
    """No thread is asked for the interpreter here, so another one sees an end that is not yet there only while the
    conversion goes on without it: in one of some tries, if the system lets that thread run in time."""
    stored, target = torch.randn(2**22).view(2048, 2048), torch.empty(2048, 2048, dtype=torch.bfloat16)
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        assert any(_runs_beside(lambda: own.convert(stored, target)) for _ in range(50))
    finally:
        sys.setswitchinterval(before)


def _runs_beside(work: Callable[[], None]) -> bool:
    began, ended = threading.Event(), []

    def run() -> None:
        began.set()
        work()
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    began.wait(20)
    beside = not ended
    thread.join(20)
    return beside
