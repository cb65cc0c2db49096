"""Statistics that only some scorers need, collected only when one is asked for. Declares them, no more.

In `dims`, 2 is the halves, L MoE layers, E experts, H the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Needs = frozenset[str]

NOTHING: Needs = frozenset()


@dataclass(frozen=True, slots=True)
class Extra:
    """`summed` ones add up over tokens; the others say something of the model, or of the whole text at once."""

    version: str
    dims: str
    summed: bool
    meaning: str

    def shape(self, layers: int, experts: int, hidden: int) -> tuple[int, ...]:
        sizes = {"2": 2, "L": layers, "E": experts, "H": hidden}
        return tuple(sizes[letter] for letter in self.dims)


EXTRAS: Mapping[str, Extra] = {
    "coactivations": Extra("1", "2LEE", True, "CO: + 1 for every pair of experts that a token was routed to together"),
    "logit_products": Extra("1", "2LEE", True, "ZG: + z z^T, z being a token's logits less their mean"),
    "output_sums": Extra("1", "2LEH", True, "S1: + o, the unweighted output"),
    "router_distances": Extra("1", "LEE", False, "|Wg_i - Wg_j|, the distance of two experts' router rows"),
    "elimination": Extra("1", "LE", False, "the share of the layer's output that is lost once e is dropped, greedily"),
    "router_growth": Extra("1", "LE", False, "|Wg_e| - |base Wg_e|, how much longer a router row is than the base's"),
}


def formulas(needs: Iterable[str]) -> tuple[str, ...]:
    """Name and version of each: part of a profile's id."""
    return tuple(f"{name}={EXTRAS[name].version}" for name in sorted(needs))
