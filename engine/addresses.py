"""Tensors as C is told of them: where they begin, and their dtypes by number."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES: Mapping[torch.dtype, int] = {torch.float32: 0, torch.bfloat16: 1}  # as products.c counts them


def address_of(tensor: Tensor | None) -> int:
    """0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
