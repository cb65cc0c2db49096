"""Linear layers in oneDNN's order: the same numbers to rounding, or everything as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from engine.packed_linear import PackedLinear, pack_linears

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Shifted(PackedLinear):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) + 0.01


class Broken(PackedLinear):
    def forward(self, rows: Tensor) -> Tensor:
        raise TypeError("another form of the operation")


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(24, 40), nn.GELU())
    return nn.Sequential(inner, nn.Linear(40, 8, bias=False), nn.LayerNorm(8)).requires_grad_(False)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (17, 24), (2, 5, 24)])
def test_packed_layers_give_what_plain_ones_give(model: nn.Sequential, shape: tuple[int, ...]) -> None:
    rows = torch.randn(shape)
    plain = model(rows)
    assert pack_linears(model, lambda: model(torch.ones(3, 24)))
    assert [type(layer) for layer in (model[0][0], model[1])] == [PackedLinear, PackedLinear]  # type: ignore[index]
    torch.testing.assert_close(model(rows), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrong", [Shifted, Broken])
def test_layers_that_give_something_else_are_all_put_back(
    model: nn.Sequential, monkeypatch: pytest.MonkeyPatch, wrong: type[PackedLinear]
) -> None:
    rows = torch.randn(3, 24)
    plain = model(rows)
    monkeypatch.setattr("engine.packed_linear.PackedLinear", wrong)
    assert not pack_linears(model, lambda: model(rows))
    assert type(model[1]) is nn.Linear
    assert torch.equal(model(rows), plain)


def test_layers_of_another_type_are_left_alone() -> None:
    half = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16)).requires_grad_(False)
    assert pack_linears(half, lambda: half(torch.ones(1, 8, dtype=torch.bfloat16)).float())
    assert type(half[0]) is nn.Linear
