"""How many experts a token calls in each layer, for a budget of calls: LExI (arXiv 2509.02753), by dynamic programming.

A layer's error with k calls is how far its output then is from that with all K, on random normal inputs: no text is
needed. L MoE layers, K calls a token, n tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from engine.engine import Engine
from profiler.evidence import HeldOut, put_evaluations
from profiler.finite import require_finite
from profiler.price import best_by_size
from profiler.progress import Report
from store.database import Store
from store.errors import InvalidInput, UnsupportedFamily
from store.records import F64, Profile, StoredSelection
from store.stand_ins import attach

INPUTS = 512  # random tokens, in one batch
SEED = 20250902
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Errors:
    """`absolute` f64 [L, K]: |MoE_l(X; k) - MoE_l(X; K)| for k = 1 ... K; `outputs` [L]: |MoE_l(X; K)|."""

    absolute: F64
    outputs: F64

    @property
    def shares(self) -> F64:
        """Of a layer's output, which makes layers comparable that write at different sizes. [L, K]"""
        return self.absolute / np.maximum(self.outputs, np.finfo(np.float64).tiny)[:, None]


# What a rule makes least, f64 [L, K]. `equal` is what the others have to beat: the same in every layer, but for a rest.
RULES: Mapping[str, Callable[[Errors], F64]] = {
    "lexi": lambda errors: errors.absolute,
    "lexi_shares": lambda errors: errors.shares,
    "equal": lambda errors: np.broadcast_to(1 / np.arange(1, errors.absolute.shape[1] + 1), errors.absolute.shape),
}


def check_active(engine: Engine, shares: Sequence[float], held_out: HeldOut | None) -> None:
    """Raises InvalidInput for shares of the calls that can't be had, UnsupportedFamily for a router that makes no
    fewer.
    """
    if not shares:
        return
    for share in shares:
        budget_of(share, engine.card.layers, engine.card.top_k)
    if engine.card.strips > 1:
        raise InvalidInput(
            f"Experts of this model lie in {engine.card.strips} strips, and what fewer calls cost is measured for "
            "whole ones. Leave --active out, or profile the unsplit model.",
            param="active",
        )
    if held_out is None:
        raise InvalidInput("Fewer calls are only served with evidence: give --eval FILE.", param="eval")
    if not engine.board.fewer:
        raise UnsupportedFamily(
            f"The routers of {engine.card.family} have no number of experts a token that could be lowered. Leave "
            "--active out."
        )


def budget_of(share: float, layers: int, top_k: int) -> int:
    """How many calls a token makes in all layers together. Raises InvalidInput unless that is at least one a layer and
    fewer than all.
    """
    whole = layers * top_k
    budget = math.floor(share * whole + 0.5) if math.isfinite(share) else 0
    if not layers <= budget < whole:
        low = "a token has one call a layer, so there are none to save" if top_k == 1 else f"at least {1 / top_k:g}"
        raise InvalidInput(
            f"--active is the share of a token's {whole} calls of experts ({top_k} in each of {layers} layers) that is "
            f"made: below 1, {low}; got {share:g}.",
            param="active",
        )
    return budget


def share_out(errors: F64, budget: int) -> tuple[int, ...]:
    """How many calls a token makes in each layer, `budget` in all, so that the sum of `errors` [L, K] is the least.

    Exact; `budget` is from one call a layer to all. Of equal sums the one with the fewest calls in the last layers.
    """
    layers, most = errors.shape
    best = np.full((layers + 1, budget + 1), np.inf)
    best[0, 0] = 0
    taken = np.zeros((layers + 1, budget + 1), dtype=int)
    for layer in range(layers):
        for spent in range(budget + 1):
            for count in range(1, min(most, spent) + 1):
                found = best[layer, spent - count] + errors[layer, count - 1]
                if found < best[layer + 1, spent]:
                    best[layer + 1, spent], taken[layer + 1, spent] = found, count
    calls = []
    for layer in range(layers, 0, -1):
        calls.append(int(taken[layer, budget]))
        budget -= calls[-1]
    return tuple(calls[::-1])


def measure_errors(engine: Engine) -> Errors:
    """Runs every layer's routed experts K times on the same random inputs."""
    card = engine.card
    noise = torch.Generator().manual_seed(SEED)
    dtype = engine.bank.layout.dtype
    absolute, outputs = np.zeros((card.layers, card.top_k)), np.zeros(card.layers)
    for layer in range(card.layers):
        x = torch.randn(INPUTS, card.hidden, generator=noise).to(dtype)  # [n, H]
        whole = engine.layers.routed(layer, x, card.top_k).double()  # [n, H]
        require_finite(whole)
        outputs[layer] = float(whole.norm())
        for calls in range(1, card.top_k):
            cut = engine.layers.routed(layer, x, calls).double()
            absolute[layer, calls - 1] = float((cut - whole).norm())
    return Errors(absolute, outputs)


def put_fewer_calls(
    engine: Engine, store: Store, profile: Profile, shares: Sequence[float], held_out: HeldOut, report: Report
) -> None:
    """Of the best selection of each size, by every rule and at each share of the calls, a copy with its evidence.

    Those that are stored are not made again. A size that the budget does not hold at once has none.
    """
    if not shares:
        return
    best = [attach(one, profile.statistics) for one, _ in best_by_size(store, profile, held_out) if one.active == 1]
    ways = [(one, share, rule) for one, share, rule in product(best, shares, RULES) if engine.plan.fits(one.selection)]
    known = {one.id: one for one in store.selections.find(profile.id)}
    made = [attach(known[name], profile.statistics) for name in (_name(*way) for way in ways) if name in known]
    missing = [way for way in ways if _name(*way) not in known]
    if missing:
        errors = measure_errors(engine)
        made += [with_calls(errors, *way) for way in missing]
    for one in made[len(made) - len(missing) :]:
        store.selections.put(one)
    put_evaluations(engine, store, profile, made, held_out, report)


def _name(stored: StoredSelection, share: float, rule: str) -> str:
    return f"{stored.id}-active{share:g}-{rule}.{VERSION}"


def with_calls(errors: Errors, stored: StoredSelection, share: float, rule: str) -> StoredSelection:
    """A copy of `stored` with that share of the calls, shared out by `rule`, under a name of its own."""
    calls = share_out(RULES[rule](errors), budget_of(share, *errors.absolute.shape))
    selection = replace(stored.selection, calls=calls)
    return replace(stored, id=_name(stored, share, rule), selection=selection, active=share, calls_by=rule)
