"""A shared expert: every token goes to it, beside those that are chosen for it. As engine.products computes it, and the
slow truth.

T tokens, H hidden, F the expert's inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.addresses import DTYPES
from engine.expert_shape import ACTIVATIONS

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """`fields` are those of products.c's `struct shared`: addresses of weights among them, which `kept` holds. What
    `share` gives is None where all of the output counts.
    """

    fields: tuple[int, ...]
    kept: tuple[Tensor, ...]
    expert: Any
    share: nn.Linear | None

    @property
    def weights(self) -> int:
        """Numbers that a token is multiplied with, biases among them."""
        return sum(tensor.numel() for tensor in self.kept)

    @classmethod
    def of(cls, modules: Sequence[Any], dtype: torch.dtype, hidden: int) -> SharedExpert | None:
        """Of what a feed-forward has beside its router and its experts. None where that is something else, by its
        parts; what it does with them is for a trial to show.
        """
        shares = [module for module in modules if type(module) is nn.Linear]
        experts = [module for module in modules if _has_the_usual_parts(module)]
        if len(experts) != 1 or len(shares) > 1 or len(modules) != len(experts) + len(shares):
            return None
        expert, share = experts[0], shares[0] if shares else None
        linears = [getattr(expert, name) for name in PROJECTIONS] + shares
        tensors = [(linear.weight, linear.bias) for linear in linears]
        held = [tensor for pair in tensors for tensor in pair if tensor is not None]
        inner = len(expert.gate_proj.weight)
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner), (1, hidden)][: len(linears)]
        fitting = [tuple(weight.shape) for weight, _ in tensors] == shapes
        if not fitting or not all(one.is_cpu and one.is_contiguous() and one.dtype == dtype for one in held):
            return None
        places = [0 if tensor is None else tensor.data_ptr() for pair in tensors for tensor in pair]
        places += [0] * (8 - len(places))
        activation = ACTIVATIONS[type(expert.act_fn).__name__]
        return cls((DTYPES[dtype], activation, *places, hidden, inner), tuple(held), expert, share)

    def plain(self, x: Tensor) -> Tensor:
        """`x` [T, H] -> [T, H], by torch alone and in the dtype of `x`."""
        gate, up, down = (getattr(self.expert, name) for name in PROJECTIONS)
        inner = self.expert.act_fn(F.linear(x, gate.weight, gate.bias)) * F.linear(x, up.weight, up.bias)  # [T, F]
        output = F.linear(inner, down.weight, down.bias)  # [T, H]
        if self.share is None:
            return output
        return F.linear(x, self.share.weight, self.share.bias).sigmoid() * output


def _has_the_usual_parts(module: Any) -> bool:
    parts = dict(module.named_children())
    parts.pop("act_fn", None)
    usual = set(parts) == set(PROJECTIONS) and all(type(part) is nn.Linear for part in parts.values())
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return usual and not own and type(getattr(module, "act_fn", None)).__name__ in ACTIVATIONS
