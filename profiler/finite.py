"""What the model says must be numbers: else nothing that was added up from it, or measured with it, means anything."""

from __future__ import annotations

import torch
from torch import Tensor

from store.errors import CheckpointError


def require_finite(said: Tensor) -> None:
    """Raises CheckpointError where a figure of the model's answers, one a token, is NaN or infinite."""
    if not bool(torch.isfinite(said).all()):
        raise CheckpointError(
            "The model's logits are not finite (NaN or infinity), so what its experts do for them means nothing. Check "
            "the checkpoint's weights (embeddings, last norm, head), or run the model in float32."
        )
