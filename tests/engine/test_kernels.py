"""Padded products equal plain ones, and few shapes reach the kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import kernels, products
from engine.engine import Engine
from engine.requests import GenerationRequest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 33, 70, 101])
def test_a_padded_product_is_the_plain_one(rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, 16), (24, 16), (24,)))
    torch.testing.assert_close(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(kernels.product(x, weight.t()), x @ weight.t())
    assert kernels.linear(x, weight).shape == (rows, 24)


LARGE, SMALL = 1 << 20, 1 << 14  # weights


def test_rows_are_split_where_padding_would_take_longer_than_one_product_more() -> None:
    assert kernels.row_counts(64, LARGE) == kernels.row_counts(64, SMALL) == (64,)
    assert kernels.row_counts(101, LARGE) == (128,)
    assert kernels.row_counts(70, LARGE) == (64, 8)
    assert kernels.row_counts(804, LARGE) == (512, 256, 32, 4)
    for rows in range(1, 2000):
        for weights in (LARGE, SMALL):
            counts = kernels.row_counts(rows, weights)
            assert all(count & (count - 1) == 0 for count in counts)
            assert sum(counts[:-1]) < rows <= sum(counts)
            assert sum(counts) + kernels.again(weights) * (len(counts) - 1) <= 1 << (rows - 1).bit_length()


def test_rows_by_few_weights_are_padded_for_a_call_takes_longer() -> None:
    assert kernels.row_counts(96, LARGE) == (64, 32)
    assert kernels.row_counts(96, SMALL) == (128,)
    assert kernels.row_counts(300, SMALL) == (256, 64)


@pytest.mark.parametrize(("dtype", "hidden", "few"), [
    (torch.bfloat16, 181, 8), (torch.bfloat16, 182, 4), (torch.float32, 181, 8), (torch.float32, 1024, 8),
    (torch.float16, 181, 0),
])  # fmt: skip
def test_more_rows_are_ours_where_there_are_few_weights(dtype: torch.dtype, hidden: int, few: int) -> None:
    plain = list(products.instruction_sets())[-1]
    assert kernels.Kernels(products.Products(plain), plain).few(dtype, 4 * hidden * hidden) == few
    assert kernels.Kernels(None, "torch").few(dtype, 4 * hidden * hidden) == 0


def test_where_the_processor_multiplies_bfloat16_many_rows_are_ours_whatever_the_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But few where torch has tiles for it."""
    own = products.Products(list(products.instruction_sets())[-1])
    monkeypatch.setattr(own, "instruction_set", kernels.PAIRS)
    chosen = kernels.Kernels(own, kernels.PAIRS)
    for tiles, few in ((False, kernels.FEW_PAIRS), (True, kernels.FEW_BESIDE_TILES)):
        monkeypatch.setattr(products.compiled, "tiles", lambda there=tiles: there)
        assert chosen.few(torch.bfloat16, 1 << 30) == few
        assert chosen.few(torch.float32, 1 << 30) == kernels.FEW[torch.float32]


@pytest.mark.parametrize("tiles", [False, True])
def test_only_powers_of_two_reach_the_kernels_in_16_bits(
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    ask: Callable[..., GenerationRequest],
    monkeypatch: pytest.MonkeyPatch,
    tiles: bool,
) -> None:
    """And none where our own take many rows."""
    monkeypatch.setattr(products, "bfloat16_in_tiles", lambda: tiles)
    engine = open_engine(checkpoint("qwen2_moe", dtype="bfloat16"))
    seen: set[int] = set()
    real = F.linear

    def watched(x: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            seen.add(x.numel() // x.shape[-1])
        return real(x, *args)

    monkeypatch.setattr(F, "linear", watched)
    for length in (1, 5, 23, 50):
        list(engine.generate([ask((7,) * length, max_tokens=3) for _ in range(3)]))
    assert bool(seen) == (tiles or not products.WIDE & {*products.instruction_sets()})
    assert not [rows for rows in seen if rows & (rows - 1)]


def test_float32_without_our_own_products_is_left_alone(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine]
) -> None:
    x = torch.randn(5, 8)
    assert kernels.pad_rows(x) is x
    engine = open_engine(checkpoint("qwen2_moe"), kernel="torch")
    assert engine.kernel == "torch (our own are switched off)"
    assert not [
        module for module in engine.passes._model.modules() if type(module) is nn.Linear and "forward" in vars(module)
    ]
    assert engine.plan.kernel_bytes == 0
