"""What one pass over text says about every expert: sums only, so that parts of a text add up in any batching.

L MoE layers, E experts a layer, K = top_k, B = 256 bins. Every array starts with `[2 halves, 2 roles]`: the half is the
item's number modulo two (for split-half stability), the role is prompt or response. Knows no model and no formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import numpy.typing as npt

from profiler.extras import EXTRAS, NOTHING, Needs
from store.errors import CorruptStore, InvalidInput
from store.records import F64

BINS = 256
VERSION = "2"  # of what is collected always; extras have versions of their own
PROMPT, RESPONSE = 0, 1


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums in f64 over valid tokens; `peak` is a maximum. z are raw logits, w the router's weights, o expert outputs.

    p is the softmax of z over the K largest z of a token (the pool); f(z) = max(z, sigmoid(z)).
    """

    top_k: int
    tokens: F64  # [2, 2]            T
    selected: F64  # [2, 2, L, E]    N    + 1 for a routed token
    gates: F64  # [2, 2, L, E]       G    + w
    norms: F64  # [2, 2, L, E]       R    + |o|
    squared_norms: F64  # [2, 2, L, E] R2 + |o|^2
    gated_norms: F64  # [2, 2, L, E] WR   + w|o|
    shifted_norms: F64  # [2, 2, L, E] WRS + s w|o|, s = max(0, 1 - cos(h, h + y))
    top_logits: F64  # [2, 2, L, E]  Z1   + z of the token's first expert by z
    pool_logits: F64  # [2, 2, L, E] Z1a  + z of the token's pool
    top_shares: F64  # [2, 2, L]     RL   + the largest p of the token
    heard: F64  # [2 halves, 2]      1, and - ln p - ln V of a token that the model was asked for: responses, or all
    utility: F64  # [2, L, E, B]     HP   + f(z) in the bin of p over [1/K, 1]; no role: it is the one large array
    peak: F64  # [L, E]              MX   max |o_i|
    extras: Mapping[str, F64] = field(default_factory=dict)  # what extras.py declares, where it was asked for

    @classmethod
    def zeros(
        cls, layers: int, experts: int, top_k: int, needs: Needs = NOTHING, hidden: int = 0, inner: int = 0
    ) -> Statistics:
        """Nothing seen yet. Of `needs`, those that add up; `hidden` is their H, `inner` their F."""
        shapes = array_shapes(layers, experts)
        summed = [name for name in sorted(needs) if EXTRAS[name].summed]
        extras = {name: np.zeros(EXTRAS[name].shape(layers, experts, hidden, inner)) for name in summed}
        return cls(top_k, **{name: np.zeros(shape) for name, shape in shapes.items()}, extras=extras)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Statistics:
        """The inverse of `arrays`. Raises CorruptStore where an array is missing or has another shape."""
        layers, experts = arrays["peak"].shape if "peak" in arrays and arrays["peak"].ndim == 2 else (0, 0)
        for name, shape in {"top_k": (1,), **array_shapes(layers, experts)}.items():
            if name not in arrays or arrays[name].shape != shape:
                found = arrays[name].shape if name in arrays else "nothing"
                raise CorruptStore(
                    f"Profile statistics want {name} of shape {shape}, found {found}. Profile the task again."
                )
        sums = {name: np.asarray(arrays[name], np.float64) for name in array_shapes(layers, experts)}
        extras = {name: np.asarray(arrays[name], np.float64) for name in EXTRAS if name in arrays}
        for name, array in extras.items():
            shape = EXTRAS[name].shape(layers, experts, array.shape[-1], array.shape[-1])
            if array.shape != shape:
                raise CorruptStore(
                    f"Profile statistics want {name} of shape {shape}, found {array.shape}. Profile the task again."
                )
        return cls(int(arrays["top_k"].item()), **sums, extras=extras)

    @property
    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        return {"top_k": np.asarray([self.top_k], np.int64), **self._sums(), **self.extras}

    @property
    def layers(self) -> int:
        return int(self.peak.shape[0])

    @property
    def experts(self) -> int:
        return int(self.peak.shape[1])

    @property
    def token_count(self) -> float:
        return float(self.tokens.sum())

    def total(self, name: str) -> F64:
        """An array summed over halves and roles: `[L, E]` (`[L]` for top_shares, `[L, E, B]` for utility, `[2]` for
        heard)."""
        if name in EXTRAS:
            return self._extra(name)
        array: F64 = getattr(self, name)
        summed: F64 = array.sum(axis=0) if name in {"utility", "heard"} else array.sum(axis=(0, 1))
        return summed

    def half(self, half: int) -> Statistics:
        """The same with the other half of the items taken out. What is a largest value stays that of all."""
        keep = np.zeros(2)
        keep[half] = 1.0
        return self._map(lambda array: array * keep.reshape(2, *[1] * (array.ndim - 1)))

    def of_role(self, role: int) -> Statistics:
        """The same without the other role's tokens, in what is kept by role; `peak` and extras stay as they are."""
        keep = np.zeros(2)
        keep[role] = 1.0
        sums = {
            name: array if name in {"peak", "utility", "heard"} else array * keep.reshape(1, 2, *[1] * (array.ndim - 2))
            for name, array in self._sums().items()
        }
        return Statistics(self.top_k, **sums, extras=self.extras)

    def scaled(self, factor: float) -> Statistics:
        """Every sum times `factor`: statistics per token with 1 / T."""
        return self._map(lambda array: array * factor)

    def __add__(self, other: Statistics) -> Statistics:
        if (self.top_k, self.peak.shape) != (other.top_k, other.peak.shape):
            raise ValueError(
                f"Statistics of {self.peak.shape} top-{self.top_k} and {other.peak.shape} top-{other.top_k}."
            )
        if self.extras.keys() != other.extras.keys():
            raise ValueError(f"Statistics with {sorted(self.extras)} and with {sorted(other.extras)}.")
        theirs = other._sums()
        sums = {name: array + theirs[name] for name, array in self._sums().items() if name != "peak"}
        extras = {name: _merged(name, array, other.extras[name]) for name, array in self.extras.items()}
        return Statistics(self.top_k, peak=np.maximum(self.peak, other.peak), **sums, extras=extras)

    def with_heard(self, heard: F64) -> Statistics:
        return replace(self, heard=heard)

    def with_extras(self, extras: Mapping[str, F64]) -> Statistics:
        return replace(self, extras={**self.extras, **extras})

    def has(self, needs: Needs) -> bool:
        return needs <= self.extras.keys()

    def _extra(self, name: str) -> F64:
        if name not in self.extras:
            raise InvalidInput(
                f"This profile was made without the statistic {name} ({EXTRAS[name].meaning}). "
                "Profile its text again with the scorer that needs it.",
                param="scorer",
            )
        return self.extras[name].sum(axis=0) if EXTRAS[name].halved else self.extras[name]

    def _sums(self) -> dict[str, F64]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in {"top_k", "extras"}}

    def _map(self, change: Callable[[F64], F64]) -> Statistics:
        sums = {name: change(array) for name, array in self._sums().items() if name != "peak"}
        extras = {name: change(a) if EXTRAS[name].halved else a for name, a in self.extras.items()}
        return Statistics(self.top_k, peak=self.peak, **sums, extras=extras)


def _merged(name: str, one: F64, other: F64) -> F64:
    """An extra of two parts of a text."""
    if EXTRAS[name].largest:
        return np.maximum(one, other)
    return one + other if EXTRAS[name].summed else one


def array_shapes(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    per_expert = (2, 2, layers, experts)
    names = ("selected", "gates", "norms", "squared_norms", "gated_norms", "shifted_norms", "top_logits", "pool_logits")
    return {
        "tokens": (2, 2),
        "heard": (2, 2),
        **dict.fromkeys(names, per_expert),
        "top_shares": (2, 2, layers),
        "utility": (2, layers, experts, BINS),
        "peak": (layers, experts),
    }


def balanced(parts: Sequence[Statistics]) -> Statistics:
    """The mean over tasks, each counting the same whatever its length: sums per token, averaged.

    `shifted_norms` are divided by their sum over the layer's experts instead, as EASY-EP mixes domains. Of the extras,
    those that every task has are kept; what does not add up is averaged as it is.
    """
    assert parts, "a mean of nothing"
    common = set.intersection(*(set(part.extras) for part in parts))
    parts = [replace(part, extras={name: part.extras[name] for name in sorted(common)}) for part in parts]
    shares = [_share(part).scaled(1 / len(parts)) for part in parts]
    fixed = [name for name in sorted(common) if not EXTRAS[name].summed]
    means: dict[str, F64] = {name: np.mean([part.extras[name] for part in parts], axis=0) for name in fixed}
    return sum(shares[1:], start=shares[0]).with_extras(means)


def _share(part: Statistics) -> Statistics:
    per_token = part.scaled(1 / max(part.token_count, 1.0))
    mass = part.total("shifted_norms").sum(axis=-1, keepdims=True)  # [L, 1]
    mixed = part.shifted_norms / np.where(mass > 0, mass, 1.0)
    sums = {name: array for name, array in per_token._sums().items() if name != "shifted_norms"}
    return Statistics(part.top_k, shifted_norms=mixed, **sums, extras=per_token.extras)
