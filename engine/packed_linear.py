"""Linear layers whose weights lie as oneDNN multiplies them fastest: for the embedder, whose queries are a few rows.

Weights are float32 before and after; only the order of sums differs, as between two versions of torch. The operation is
one that torch keeps for its own compiler, so it is tried before it is used, and a torch without it goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLOSE = 1e-5  # that a value of a unit vector may be off by
ROWS = 32  # that weights are laid out for; products of any number are right, and of 8 to 32 at their fastest


class Packed:
    """`weight` [out, in] and `bias` [out] or None, float32 on the CPU; rows are [..., in], products [..., out]."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self._bias = None if bias is None else bias.detach()

    def of(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "none", [], "")
        return product

    def gelu_of(self, rows: Tensor) -> Tensor:
        """GELU by the error function of the product, while it is at hand."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, "gelu", [], "none")
        return product

    def added_to(self, residual: Tensor, rows: Tensor) -> Tensor:
        """The sum of the product and `residual` [..., out]."""
        total: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, residual, self._weight, self._bias, "add")
        return total


class PackedLinear(nn.Module):
    """`linear`, of float32 on the CPU; [..., in] -> [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._packed = Packed(linear.weight, linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        return self._packed.of(rows)


def pack_linears(model: nn.Module, probe: Callable[[], Tensor]) -> bool:
    """Packs every plain linear layer of `model` in its place, and takes all back where `probe`, a use of the model,
    then fails or gives something else. Returns whether they stay packed."""
    wanted = probe()
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device.type == "cpu"
    ]
    try:
        for parent, name, child in places:
            setattr(parent, name, PackedLinear(child))
        good = torch.allclose(probe(), wanted, rtol=0, atol=CLOSE)
    except Exception:  # a torch without oneDNN, another form of it, a model that looks inside: it works as it was
        good = False
    if not good:
        for parent, name, child in places:
            setattr(parent, name, child)
    return good
