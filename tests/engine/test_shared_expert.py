"""A shared expert in one call: against torch, on every instruction set, and which modules it knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.products import Products, instruction_sets
from engine.shared_expert import SharedExpert

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the products were not built: there was no C compiler")

NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest number


class _Expert(nn.Module):
    def __init__(self, hidden: int, inner: int, bias: bool = False, act: nn.Module | None = None) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias), nn.Linear(hidden, inner, bias)
        self.down_proj, self.act_fn = nn.Linear(inner, hidden, bias), act or nn.SiLU()


def made(hidden: int, inner: int, dtype: torch.dtype, *, bias: bool = False, share: bool = True) -> SharedExpert:
    modules = [_Expert(hidden, inner, bias), *([nn.Linear(hidden, 1, bias)] if share else [])]
    found = SharedExpert.of([module.to(dtype) for module in modules], dtype, hidden)
    assert found is not None
    return found


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= NEAR[wanted.dtype] * wanted.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("dtype", list(NEAR))
def test_the_call_is_the_slow_truth_and_a_row_is_that_row_alone(
    own: Products, dtype: torch.dtype, share: bool, bias: bool
) -> None:
    for hidden, inner in ((1, 1), (24, 7), (67, 130), (128, 96)):
        shared = made(hidden, inner, dtype, bias=bias, share=share)
        x = torch.randn(5, hidden).to(dtype)
        found = own.shared(shared, x)
        assert close(found, shared.plain(x))
        for row in range(5):
            assert torch.equal(own.shared(shared, x[row : row + 1])[0], found[row])


@torch.inference_mode()
def test_threads_change_no_bit(own: Products) -> None:
    shared, x = made(256, 700, torch.bfloat16), torch.randn(3, 256).bfloat16()  # a megabyte: worth several threads
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(own.shared(shared, x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_its_weights_are_counted() -> None:
    assert made(8, 5, torch.float32).weights == 3 * 8 * 5 + 8


def test_only_a_gated_expert_of_plain_linear_layers_and_at_most_one_share_is_known() -> None:
    expert, share = _Expert(8, 5), nn.Linear(8, 1, bias=False)

    def known(*modules: Any, hidden: int = 8, dtype: torch.dtype = torch.float32) -> SharedExpert | None:
        return SharedExpert.of(modules, dtype, hidden)

    assert known(expert, share) is not None
    assert known(share, expert) is not None
    assert known(expert) is not None
    for others in (
        (),
        (share,),
        (expert, share, share),
        (expert, expert),
        (expert, nn.SiLU()),
        (expert, nn.Linear(8, 2)),
    ):
        assert known(*others) is None
    assert known(_Expert(8, 5, act=nn.Softplus())) is None
    assert known(expert, hidden=9) is None
    assert known(expert, dtype=torch.bfloat16) is None
    expert.scale = nn.Parameter(torch.ones(1))
    assert known(expert) is None
