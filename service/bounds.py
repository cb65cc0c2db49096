"""What a request will not wait for: refused before it is queued, with the numbers."""

from __future__ import annotations

from engine.requests import SwapCost
from store.errors import Busy, InvalidInput
from store.sizes import show_bytes


class SwapTooLong(Busy):
    """A 503: another request may bring the experts, and then this one waits for none."""

    code = "swap_too_long"


def require_swap_within(most_ms: float, predicted: SwapCost | None) -> None:
    """Raises SwapTooLong where the prediction is above the bound, InvalidInput where nothing can be predicted."""
    if predicted is None:
        raise InvalidInput(
            f"`max_swap_ms` ({most_ms:g}) bounds a swap, and in exact mode each token decides what is read. Leave it "
            "out, or ask for mode mask.",
            param="max_swap_ms",
        )
    if 1000 * predicted.seconds > most_ms:
        raise SwapTooLong(
            f"{show_bytes(predicted.bytes)} of the task's experts are not in memory; reading them takes about "
            f"{1000 * predicted.seconds:.0f} ms, and `max_swap_ms` is {most_ms:g}. Try again later, raise it, or "
            "prefetch the task."
        )
