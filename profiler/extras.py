"""Statistics that only some scorers need, collected only when one is asked for. Declares them, no more.

In `dims`, the first 2 is the halves, L MoE layers, E experts, P their 2^E sets, H the hidden size, F the channels of an
expert (another 2 is gate and up).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Needs = frozenset[str]

NOTHING: Needs = frozenset()


@dataclass(frozen=True, slots=True)
class Extra:
    """`summed` ones add up over tokens (`largest`: the largest counts); the others say something of the model, or of
    the whole text at once.
    """

    version: str
    dims: str
    summed: bool
    meaning: str
    largest: bool = False

    def shape(self, layers: int, experts: int, hidden: int, inner: int = 0) -> tuple[int, ...]:
        sizes = {"2": 2, "L": layers, "E": experts, "H": hidden, "F": inner, "P": 1 << min(experts, 8)}
        return tuple(sizes[letter] for letter in self.dims)

    @property
    def halved(self) -> bool:
        """Whether the halves of the text are kept apart."""
        return self.dims.startswith("2")


EXTRAS: Mapping[str, Extra] = {
    "coactivations": Extra("1", "2LEE", True, "CO: + 1 for every pair of experts that a token was routed to together"),
    "logit_products": Extra("1", "2LEE", True, "ZG: + z z^T, z being a token's logits less their mean"),
    "output_sums": Extra("1", "2LEH", True, "S1: + o, the unweighted output"),
    "router_distances": Extra("1", "LEE", False, "|Wg_i - Wg_j|, the distance of two experts' router rows"),
    "subset_losses": Extra("1", "LP", False, "what the layer's output is off by inside each set of experts, by bits"),
    "dropping": Extra("1", "LE", False, "the window at whose end e is dropped, and its last share of router weight"),
    "relaxation": Extra("1", "LE", False, "beta_l E softmax(alpha_l)_e, learned by gradients with all weights frozen"),
    "elimination": Extra("1", "LE", False, "the share of the layer's output that is lost once e is dropped, greedily"),
    "answer_elimination": Extra("1", "LE", False, "the same of response tokens alone"),
    "channel_sums": Extra("1", "2LEF", True, "SH: + h, what the down projection takes"),
    "channel_squares": Extra("1", "2LEF", True, "SH2: + h^2"),
    "channel_gated": Extra("1", "2LEF", True, "SWH2: + (w h)^2"),
    "channel_inputs": Extra("1", "22LEF", True, "SG2: + the squares of what gate and up give"),
    "channel_peaks": Extra("1", "LEF", True, "MWH: the largest |w h|", largest=True),
    "channel_gradients": Extra("1", "LEF", False, "the mean of q^2 over routed tokens, q the loss's gradient by h"),
    "channel_products": Extra("1", "LEF", False, "the mean of (h q)^2 over routed tokens"),
    "channel_directions": Extra("1", "LEF", False, "the mean of (w h q / |q|)^2, q by the loss of the responses alone"),
    "down_norms": Extra("1", "LEF", False, "|Wd_c|, the length of a channel's column of the down projection"),
    "down_sums": Extra("1", "LEF", False, "the sum of |Wd_ic| over that column"),
    "router_growth": Extra("1", "LE", False, "|Wg_e| - |base Wg_e|, how much longer a router row is than the base's"),
}


def formulas(needs: Iterable[str]) -> tuple[str, ...]:
    """Name and version of each: part of a profile's id."""
    return tuple(f"{name}={EXTRAS[name].version}" for name in sorted(needs))
