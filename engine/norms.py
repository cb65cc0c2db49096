"""RMS norms of few numbers by engine.products: one call in place of torch's eight, for modules that compute the usual.

Whether a module does is found out by trying it. Knows no model and no routing. K columns.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from engine.addresses import DTYPES
from engine.block_shape import norm_eps
from engine.products import Products

FEW = 1 << 14  # numbers; with more, torch's eight passes over memory are no longer what takes the time
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of a number: what rounding in another order may cost


def adopt_norms(model: nn.Module, own: Products) -> None:
    """Every norm of `model`, which has its weights, goes to `own` where it computes the same."""
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and computes_the_usual(module, own):
            _take_over(module, own)


def computes_the_usual(module: Any, own: Products) -> bool:
    """Rows by their root mean square, then times the weights. Tried with rows so small that its `eps` counts."""
    weight, eps = getattr(module, "weight", None), norm_eps(module)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.dtype not in DTYPES or eps is None:
        return False
    alone = [*module.state_dict(), *module.children()] == ["weight"] and weight.is_cpu and weight.is_contiguous()
    if not alone or len(inspect.signature(type(module).forward).parameters) != 2:  # self and the states
        return False
    generator = torch.Generator().manual_seed(2)
    sizes = torch.tensor([1e-4, 1e-3, 1.0, 30.0]).unsqueeze(1)  # [4, 1]
    x = (torch.randn(4, len(weight), generator=generator) * sizes).to(weight.dtype)  # [4, K]
    with torch.inference_mode():
        theirs = module(x)
        return theirs.dtype == x.dtype and torch.allclose(
            own.norm(x, weight, eps), theirs, rtol=TOLERANCE[x.dtype], atol=0
        )


def _take_over(module: Any, own: Products) -> None:
    theirs, weight, eps = module.forward, module.weight, float(norm_eps(module) or 0.0)

    def forward(x: Tensor) -> Tensor:
        few = x.numel() <= FEW and x.dtype == weight.dtype and x.shape[-1] == len(weight)
        return own.norm(x, weight, eps) if few else theirs(x)

    module.forward = forward
