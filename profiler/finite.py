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


def require_finite_outputs(outputs: Tensor) -> None:
    """Of all experts of a layer on a sample, `[m, E, H]`, also those that no token chose. Raises CheckpointError."""
    wrong = (~torch.isfinite(outputs).all(dim=2).all(dim=0)).nonzero().flatten().tolist()
    if wrong:
        raise CheckpointError(
            f"The outputs of expert {', '.join(map(str, wrong))} are not finite (NaN or infinity), so what a layer "
            "loses without it means nothing. Check the checkpoint's weights, run the model in float32, or choose a "
            "scorer that tries no expert on tokens it was not chosen for."
        )
