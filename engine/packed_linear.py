"""Linear layers whose weights lie as oneDNN multiplies them fastest: for the embedder, whose queries are a few rows.

Weights are float32 before and after; only the order of sums differs, as between two versions of torch. The operation is
one that torch keeps for its own compiler, so it is tried before it is used, and a torch without it goes on as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

CLOSE = 1e-5  # that a value of a unit vector may be off by


class PackedLinear(nn.Module):
    """`linear`, of float32 on the CPU; [..., in] -> [..., out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias

    def forward(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return product


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
