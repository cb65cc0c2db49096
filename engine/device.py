"""The device that a name means, tried before anything is loaded onto it. Knows nothing of models."""

from __future__ import annotations

import torch

from store.errors import InvalidInput


def open_device(name: str) -> torch.device:
    """Raises InvalidInput for a name that torch does not know, and for a device that is not there."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # an assertion: this torch was built without CUDA
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InvalidInput(
            f"The model can't run on device {name!r}: {reason}. Give --device cpu, or a device that this torch "
            "can use, such as cuda:0.",
            param="device",
        ) from None
    return device
