"""Watches the model run and adds up what it sees into Statistics.

T tokens of a batch flattened row by row, E experts, K = top_k, H hidden, B histogram bins. Collects of the extras just
those that it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from profiler.extras import EXTRAS, NOTHING, Needs
from profiler.statistics import BINS, Statistics, array_shapes
from store.errors import CheckpointError

REDUCED_AT_ONCE = 1 << 20  # numbers of expert outputs that are held before they are reduced to norms

_ROUTED = ("selected", "gates", "top_logits", "pool_logits")
_COMPUTED = ("norms", "squared_norms", "gated_norms", "shifted_norms")


@dataclass(slots=True)
class _Pass:
    """One layer's tokens between `residual` and `combined`, and what its experts gave, in the order they ran."""

    residual: Tensor  # [T, H]
    valid: Tensor  # bool [T]
    gates: Tensor  # f64 [T, E], 0 for padding
    experts: list[int] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)  # i64 [n] each
    outputs: list[Tensor] = field(default_factory=list)  # [n, H] each, of the experts that are not reduced yet
    waiting: int = 0  # how many numbers those are
    norms: list[Tensor] = field(default_factory=list)  # [n] each
    peaks: list[Tensor] = field(default_factory=list)  # [n] each

    def take(self, expert: int, tokens: Tensor, outputs: Tensor) -> None:
        """Many experts see few tokens each: they are reduced together, as soon as they are worth it."""
        self.experts.append(expert)
        self.tokens.append(tokens)
        self.outputs.append(outputs)
        self.waiting += outputs.numel()
        if self.waiting >= REDUCED_AT_ONCE:
            self.reduce()

    def reduce(self) -> None:
        if self.outputs:
            outputs = torch.cat(self.outputs)  # [n, H]
            outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            self.norms.append(torch.linalg.vector_norm(outputs, dim=-1))
            # Ten times faster on the CPU than the norm of order infinity, which says the same.
            self.peaks.append(torch.maximum(outputs.amax(dim=-1), -outputs.amin(dim=-1)))
            self.outputs.clear()
            self.waiting = 0

    def table(self, values: list[Tensor]) -> Tensor:
        """What was gathered expert by expert as f64 [T, E], 0 where an expert did not see the token."""
        table = torch.zeros_like(self.gates)
        if values:
            sizes = torch.tensor([len(tokens) for tokens in self.tokens], device=table.device)
            experts = torch.tensor(self.experts, device=table.device).repeat_interleave(sizes)  # [n_all]
            table[torch.cat(self.tokens), experts] = torch.cat(values).to(torch.float64)
        return table.where(self.valid[:, None], 0.0)


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
        self._buckets = torch.zeros(4, 0, dtype=torch.float64, device=device)  # [4, T]
        self._halves = torch.zeros(0, dtype=torch.long, device=device)  # [T]
        self._residual: Tensor | None = None
        self._pass: _Pass | None = None

    def begin(self, roles: Tensor, halves: Tensor) -> None:
        """Say what the next forward's tokens are: `roles` i64 [rows, length] and `halves` i64 [rows], all 0 or 1."""
        device = self._buckets.device
        bucket = (halves[:, None] * 2 + roles).flatten().to(device)  # [T]
        self._buckets = torch.nn.functional.one_hot(bucket, 4).to(torch.float64).T  # [4, T]
        self._halves = halves[:, None].expand_as(roles).flatten().to(device)  # [T]

    def statistics(self) -> Statistics:
        """The sums so far, as a copy."""
        arrays = {name: tensor.cpu().numpy().copy() for name, tensor in self._sums.items()}
        shapes = array_shapes(*self._shape)
        arrays["utility"] = arrays["utility"].transpose(1, 0, 2, 3).copy()  # [2, L, E, B]
        for name in shapes.keys() - {"tokens", "top_shares", "utility", "peak"}:
            arrays[name] = arrays[name].transpose(1, 0, 2).reshape(shapes[name])  # [2, 2, L, E]
        arrays["top_shares"] = arrays["top_shares"].T.reshape(shapes["top_shares"])  # [2, 2, L]
        arrays["tokens"] = arrays["tokens"].reshape(2, 2)
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
        assert valid.shape[0] == self._buckets.shape[1], "begin was told of another batch"
        z = torch.where(valid[:, None], logits, 0)  # [T, E]
        _refuse_infinite(z, layer, "router logits")
        chosen, gates = self._spread(weights, index, valid)  # [T, E], [T, E]
        highest, ids = z.topk(self._top_k, dim=-1)  # [T, K], [T, K]
        pool = highest.to(torch.float64)  # [T, K]
        shares = pool.softmax(-1)  # [T, K]
        buckets = self._buckets * valid  # [4, T]
        if layer == 0:  # tokens pass every layer, but count once
            self._sums["tokens"] += buckets.sum(dim=1)
        top = torch.zeros_like(gates).scatter(1, ids[:, :1], pool[:, :1])  # [T, E]
        pooled = torch.zeros_like(gates).scatter(1, ids, pool)  # [T, E]
        for name, values in zip(_ROUTED, (chosen, gates, top, pooled), strict=True):
            self._sums[name][layer] += buckets @ values  # [4, E]
        self._sums["top_shares"][layer] += buckets @ shares[:, 0]  # [4]
        self._fill_histogram(layer, pool, ids, shares, valid)
        if self._extras:
            self._multiply(layer, chosen, z.to(torch.float64), valid)
        self._pass = _Pass(self._residual, valid, gates)

    def expert(self, layer: int, expert: int, tokens: Tensor, weights: Tensor, outputs: Tensor) -> None:  # noqa: ARG002
        assert self._pass is not None, "the routing comes before the experts"
        self._pass.take(expert, tokens, outputs)
        if "output_sums" in self._extras:
            sums = self._extras["output_sums"][:, layer, expert]  # [2, H]
            real = self._pass.valid[tokens]  # [n]
            sums.index_add_(0, self._halves[tokens][real], outputs[real].to(torch.float64))

    def combined(self, layer: int, y: Tensor) -> None:
        assert self._pass is not None, "the routing comes before the output"
        now = self._pass
        now.reduce()
        shift = torch.where(now.valid, _shift(now.residual, y), 0.0)  # [T]
        norms, peaks = now.table(now.norms), now.table(now.peaks)  # [T, E], [T, E]
        gated = now.gates * norms  # [T, E]
        buckets = self._buckets * now.valid  # [4, T]
        parts = (norms, norms.square(), gated, shift[:, None] * gated)
        sums = torch.stack([buckets @ values for values in parts])  # [4, 4, E]
        _refuse_infinite(sums, layer, "expert outputs")
        for name, added in zip(_COMPUTED, sums, strict=True):
            self._sums[name][layer] += added
        self._sums["peak"][layer] = torch.maximum(self._sums["peak"][layer], peaks.amax(dim=0))  # [E]
        self._pass = self._residual = None

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

    def _spread(self, weights: Tensor, index: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """The router's choice as `[T, E]`: 1 where chosen, and the weights. Index E means "no expert" to some."""
        slots = torch.zeros(len(index), self._shape[1] + 1, dtype=torch.float64, device=index.device)  # [T, E + 1]
        real = valid[:, None].to(torch.float64).expand(index.shape)  # [T, K]
        kept = torch.where(valid[:, None], weights, 0).to(torch.float64)  # [T, K]
        chosen = slots.scatter(1, index.long(), real)[:, :-1]  # [T, E]
        return chosen, slots.scatter_add(1, index.long(), kept)[:, :-1]

    def _multiply(self, layer: int, chosen: Tensor, z: Tensor, valid: Tensor) -> None:
        """The extras that are products of experts with experts: `chosen` and `z` are [T, E], 0 for padding."""
        for name, values in (("coactivations", chosen), ("logit_products", z - z.mean(dim=1, keepdim=True))):
            if name in self._extras:
                for half in (0, 1):
                    mine = values[valid & (self._halves == half)]  # [n, E]
                    self._extras[name][half, layer] += mine.T @ mine  # [E, E]

    def _fill_histogram(self, layer: int, pool: Tensor, ids: Tensor, shares: Tensor, valid: Tensor) -> None:
        low = 1.0 / self._top_k
        # The largest of K shares is at least 1/K, so is any threshold: what lies below can never pass. Rounding may.
        counts = valid[:, None] & (shares >= low - 1e-12)  # [T, K]
        bins = ((shares - low) * (BINS / (1.0 - low) if low < 1 else 1.0)).long().clamp(0, BINS - 1)  # [T, K]
        experts = self._shape[1]
        cell = (self._halves[:, None] * experts + ids) * BINS + bins  # [T, K]
        values = torch.maximum(pool, pool.sigmoid())  # [T, K]
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
