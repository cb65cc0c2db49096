"""The functions beside modules with running states that ours take the place of: all that there are."""

from __future__ import annotations

from collections.abc import Sequence

from engine import convolution, delta_rule, state_space
from engine.products import Products
from engine.substitution import Stand, outlined


def ours(own: Products) -> Sequence[Stand]:
    """By our own products."""
    return (
        delta_rule.delta_rule(own),
        state_space.state_space(own),
        state_space.state_space_step(own),
        convolution.convolution(own),
        convolution.convolution_step(own),
    )


def outlines() -> Sequence[Stand]:
    """The same on shapes alone, for what a pass works in."""
    return (
        outlined(delta_rule.TAKES, delta_rule.outline),
        outlined(state_space.TAKES, state_space.outline),
        outlined(state_space.STEP_TAKES, state_space.step_outline),
        outlined(convolution.TAKES, convolution.outline),
        outlined(convolution.STEP_TAKES, convolution.outline),
    )
