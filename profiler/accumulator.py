"""Watches the model run and adds up what it sees into Statistics.

T tokens of a batch flattened row by row, E experts, K = top_k, H hidden, B histogram bins, n choices: pairs of a token
and one of its experts. Collects of the extras just those that it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from profiler.extras import EXTRAS, NOTHING, Needs
from profiler.statistics import BINS, Statistics, array_shapes
from store.errors import CheckpointError

REDUCED_AT_ONCE = 1 << 20  # numbers of expert outputs that are widened at a time

_ROUTED = ("selected", "gates", "top_logits", "pool_logits")
_COMPUTED = ("norms", "squared_norms", "gated_norms", "shifted_norms")


@dataclass(slots=True)
class _Pass:
    """One layer's tokens between `residual` and `combined`, and what its experts gave, without padding."""

    residual: Tensor  # [T, H]
    valid: Tensor  # bool [T]
    experts: Tensor  # i64 [n]
    tokens: Tensor  # i64 [n]
    weights: Tensor  # f64 [n]
    norms: Tensor  # f64 [n]


class Accumulator:
    """An engine observer. Call `begin` before each forward, `statistics` at the end; not for use by two threads.

    Trusts the router for weights and choice (never its own top-k, never a softmax); logits are taken as they come.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        device: str = "cpu",
        *,
        needs: Needs = NOTHING,
        hidden: int = 0,
        inner: int = 0,
    ) -> None:
        """`needs` names the extras that add up; `hidden` and `inner` are only needed for those of that size."""
        self._shape, self._top_k = (layers, experts), top_k
        self._extras = {
            name: torch.zeros(EXTRAS[name].shape(layers, experts, hidden, inner), dtype=torch.float64, device=device)
            for name in sorted(needs)
            if EXTRAS[name].summed
        }
        make = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in self._shapes().items()}
        self._sums: dict[str, Tensor] = make
        self._buckets = torch.zeros(0, dtype=torch.long, device=device)  # [T] half x 2 + role
        self._halves = torch.zeros(0, dtype=torch.long, device=device)  # [T]
        self._residual: Tensor | None = None
        self._pass: _Pass | None = None

    def begin(self, roles: Tensor, halves: Tensor) -> None:
        """Say what the next forward's tokens are: `roles` i64 [rows, length] and `halves` i64 [rows], all 0 or 1."""
        device = self._buckets.device
        self._buckets = (halves[:, None] * 2 + roles).flatten().to(device)  # [T]
        self._halves = halves[:, None].expand_as(roles).flatten().to(device)  # [T]

    def statistics(self) -> Statistics:
        """The sums so far, as a copy."""
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in self._sums.items()}
        shapes = array_shapes(*self._shape)
        arrays["utility"] = arrays["utility"].transpose(1, 0, 2, 3).copy()  # [2, L, E, B]
        for name in shapes.keys() - {"tokens", "heard", "top_shares", "utility", "peak"}:
            arrays[name] = arrays[name].transpose(1, 0, 2).reshape(shapes[name])  # [2, 2, L, E]
        arrays["top_shares"] = arrays["top_shares"].T.reshape(shapes["top_shares"])  # [2, 2, L]
        arrays["tokens"] = arrays["tokens"].reshape(2, 2)
        arrays["heard"] = np.zeros(shapes["heard"])  # of what the model says, which no observer is shown
        extras = {name: tensor.cpu().numpy().copy() for name, tensor in self._extras.items()}
        return Statistics(self._top_k, **arrays, extras=extras)

    def residual(self, layer: int, h: Tensor) -> None:
        assert layer < self._shape[0], layer
        self._residual = h  # [T, H]

    def routed(
        self,
        layer: int,
        x: Tensor,  # noqa: ARG002
        logits: Tensor,
        weights: Tensor,
        index: Tensor,
        valid: Tensor,
    ) -> None:
        assert self._residual is not None, "the residual comes before the routing"
        assert valid.shape == self._buckets.shape, "begin was told of another batch"
        real = valid.nonzero().flatten()  # [m]
        z, index = logits[real], index[real].long()  # [m, E], [m, K]
        _refuse_infinite(z, layer, "router logits")
        highest, ids = z.topk(self._top_k, dim=-1)  # [m, K], [m, K]
        pool = highest.to(torch.float64)  # [m, K]
        shares, buckets = pool.softmax(-1), self._buckets[real]  # [m, K], [m]
        if layer == 0:  # tokens pass every layer, but count once
            self._sums["tokens"] += torch.bincount(buckets, minlength=4)
        kept = weights[real].to(torch.float64)  # [m, K]
        self._add(layer, ("selected", "gates"), buckets[:, None], index, (torch.ones_like(kept), kept))
        first = torch.zeros_like(pool).index_copy(1, ids.new_zeros(1), pool[:, :1])  # [m, K]
        self._add(layer, ("top_logits", "pool_logits"), buckets[:, None], ids, (first, pool))
        self._sums["top_shares"][layer].index_add_(0, buckets, shares[:, 0])
        self._fill_histogram(layer, pool, ids, shares, self._halves[real])
        if self._extras:
            self._multiply(layer, index, z.to(torch.float64), self._halves[real])
        nobody = self._halves[:0]  # [0]
        self._pass = _Pass(self._residual, valid, nobody, nobody, kept[:0, 0], kept[:0, 0])

    def experts(self, layer: int, experts: Tensor, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:
        assert self._pass is not None, "the routing comes before the experts"
        now, real = self._pass, self._pass.valid[tokens]  # [n]
        if not bool(real.all()):
            experts, tokens, weights, outputs = experts[real], tokens[real], weights[real], outputs[real]
        now.experts, now.tokens, now.weights = experts.long(), tokens, weights.to(torch.float64)
        rows = max(1, REDUCED_AT_ONCE // outputs.shape[1])
        norms = [outputs.new_zeros(0, dtype=torch.float64)]
        for start in range(0, len(outputs), rows):
            part = outputs[start : start + rows]  # [r, H]
            norms.append(self._reduce(layer, now.experts[start : start + rows], tokens[start : start + rows], part))
        now.norms = torch.cat(norms)

    def combined(self, layer: int, y: Tensor) -> None:
        assert self._pass is not None, "the routing comes before the output"
        now = self._pass
        shift = _shift(now.residual, y)[now.tokens]  # [n]
        gated = now.weights * now.norms  # [n]
        parts = (now.norms, now.norms.square(), gated, shift * gated)
        added = self._add(layer, _COMPUTED, self._buckets[now.tokens], now.experts, parts)
        _refuse_infinite(added, layer, "expert outputs")
        self._pass = self._residual = None

    def _reduce(self, layer: int, experts: Tensor, tokens: Tensor, outputs: Tensor) -> Tensor:
        """Adds what needs the outputs [r, H] themselves; gives their norms, f64 [r]."""
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))  # [r, H]
        # Ten times faster on the CPU than the norm of order infinity, which says the same.
        peaks = torch.maximum(wide.amax(dim=-1), -wide.amin(dim=-1)).to(torch.float64)  # [r]
        self._sums["peak"][layer].scatter_reduce_(0, experts, peaks, "amax")
        if "output_sums" in self._extras:
            sums = torch.zeros(2 * self._shape[1], outputs.shape[1], dtype=torch.float64, device=outputs.device)
            sums.index_add_(0, self._halves[tokens] * self._shape[1] + experts, outputs.to(torch.float64))
            self._extras["output_sums"][:, layer] += sums.view(2, self._shape[1], -1)
        norms: Tensor = torch.linalg.vector_norm(wide, dim=-1)  # [r]
        return norms.to(torch.float64)

    def _add(
        self, layer: int, names: Sequence[str], buckets: Tensor, experts: Tensor, values: Sequence[Tensor]
    ) -> Tensor:
        """Adds each of `values` at its bucket and expert, all of one shape; gives what was added, [names, 4, E].
        Index E means "no expert" to some."""
        cells = (buckets * (self._shape[1] + 1) + experts).flatten()  # [n]
        stacked = torch.stack([each.flatten() for each in values])  # [names, n]
        table = stacked.new_zeros(len(names), 4 * (self._shape[1] + 1))
        table.scatter_add_(1, cells.expand_as(stacked), stacked)
        added = table.view(len(names), 4, -1)[:, :, :-1]  # [names, 4, E]
        for name, sums in zip(names, added, strict=True):
            self._sums[name][layer] += sums
        return added

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The layer leads here, so that one layer's sums are one contiguous block."""
        layers, experts = self._shape
        sums: dict[str, tuple[int, ...]] = dict.fromkeys((*_ROUTED, *_COMPUTED), (layers, 4, experts))
        return sums | {
            "tokens": (4,),
            "top_shares": (layers, 4),
            "utility": (layers, 2, experts, BINS),
            "peak": (layers, experts),
        }

    def _multiply(self, layer: int, index: Tensor, z: Tensor, halves: Tensor) -> None:
        """The extras that are products of experts with experts, of `index` [m, K] and `z` [m, E]."""
        experts = self._shape[1]
        chosen = z.new_zeros(len(z), experts + 1).scatter(1, index, 1.0)[:, :experts]  # [m, E]
        for name, values in (("coactivations", chosen), ("logit_products", z - z.mean(dim=1, keepdim=True))):
            if name in self._extras:
                for half in (0, 1):
                    mine = values[halves == half]  # [n, E]
                    self._extras[name][half, layer] += mine.T @ mine  # [E, E]

    def _fill_histogram(self, layer: int, pool: Tensor, ids: Tensor, shares: Tensor, halves: Tensor) -> None:
        low = 1.0 / self._top_k
        # The largest of K shares is at least 1/K, so is any threshold: what lies below can never pass. Rounding may.
        counts = shares >= low - 1e-12  # [m, K]
        bins = ((shares - low) * (BINS / (1.0 - low) if low < 1 else 1.0)).long().clamp(0, BINS - 1)  # [m, K]
        cell = (halves[:, None] * self._shape[1] + ids) * BINS + bins  # [m, K]
        values = torch.maximum(pool, pool.sigmoid())  # [m, K]
        self._sums["utility"][layer].view(-1).index_add_(0, cell[counts], values[counts])


def _shift(h: Tensor, y: Tensor) -> Tensor:
    """How far the block turns each token: max(0, 1 - cos(h, h + y)), f64 [T]."""
    before, after = h.to(torch.float64), h.to(torch.float64) + y.to(torch.float64)  # [T, H], [T, H]
    return (1.0 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).clamp_min(0.0)  # [T]


def _refuse_infinite(values: Tensor, layer: int, what: str) -> None:
    if not torch.isfinite(values).all():
        raise CheckpointError(
            f"The {what} of MoE layer {layer} are not finite (NaN or infinity), so no expert of it can be scored. "
            "Check the checkpoint's weights, or run the model in float32."
        )
