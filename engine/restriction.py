"""One layer's router, limited to a set of experts. Knows one layer and one set; batches and metering are routing's.

T tokens, E experts, M of them allowed, k experts a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels import pad_rows
from store.errors import UnsupportedFamily

Routed = tuple[Tensor, Tensor, Tensor]  # logits [T, E], weights [T, k], index [T, k]
ADOPTED = "moepager_argument_"  # tensors that a router is called with, kept at the router; see engine.skeleton
BATCHED = "moepager_batched"  # set where a router wants its hidden states as [1, T, H]
FORWARD = "moepager_forward"  # what is called in place of the class's own forward; see `adopt_linear`
Route = Callable[[Tensor], Routed]
Limited = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # x [T, H], logits [T, E] -> weights, index [T, k]


@dataclass(frozen=True, slots=True)
class Restriction:
    """`route(x [T, H], logits [T, E])` -> weights and index [T, k]; `allowed` bool [E]; `forbidden` bool [1, E] where
    the router's logits alone decide; `held` bool [E, P] where of an allowed expert only some strips are there, and the
    same as `Strips.listed`.
    """

    allowed: Tensor
    route: Limited
    forbidden: Tensor | None = None
    held: Tensor | None = None
    listed: list[list[int]] | None = None

    @property
    def inside(self) -> Tensor:
        """How much of each expert is there: bool [E], or f32 [E] with strips."""
        return self.allowed if self.held is None else self.held.float().mean(1)


def restrict(router: Any, ids: Sequence[int]) -> Restriction:
    """`router` limited to the experts `ids`: exactly the router with its rows sliced; group-limited gates are
    masked.
    """
    experts = int(router.num_experts)
    device = next(router.parameters()).device
    kept = torch.tensor(list(ids), device=device)  # [M]
    allowed = torch.zeros(experts, dtype=torch.bool, device=device).index_fill_(0, kept, True)  # [E]
    if groups_of(router) > 1:
        gate = GroupLimitedGate.of(router)
        return Restriction(allowed, lambda _, logits: gate(logits, allowed))
    sliced = slice_router(router, kept, experts)

    def route(x: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, index = call_router(sliced, pad_rows(x))
        return weights[: len(x)], kept[index[: len(x)]]

    return Restriction(allowed, route)


def call_router(router: Any, x: Tensor) -> Routed:
    """The router's own forward of `x` [T, H], with what its block would have given it besides."""
    extras = [getattr(router, name) for name in sorted([*router._parameters, *router._buffers]) if ADOPTED in name]
    shaped = x.unsqueeze(0) if getattr(router, BATCHED, False) else x  # [1, T, H] or [T, H]
    forward = getattr(router, FORWARD, type(router).forward)
    routed: Routed = forward(router, shaped, *extras)
    return routed


def adopt_linear(router: Any, linear: Callable[..., Tensor]) -> None:
    """The router's products are `linear`'s from now on: they are written in its forward, where no module stands that
    could be replaced."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(x, weight, bias) if x.dim() == 2 else F.linear(x, weight, bias)

    setattr(router, FORWARD, _with_linear(type(router).forward, product))


def _with_linear(forward: Any, linear: Callable[..., Tensor]) -> Any:
    """The same code, in which `linear` stands for torch.nn.functional's; `forward` itself where it has no such name."""
    names = [name for name, value in getattr(forward, "__globals__", {}).items() if value is F]
    if not set(names) & set(forward.__code__.co_names):
        return forward
    functional = SimpleNamespace(**{**vars(F), "linear": linear})
    known = {**forward.__globals__, **dict.fromkeys(names, functional)}
    return FunctionType(forward.__code__, known, forward.__name__, forward.__defaults__, forward.__closure__)


def groups_of(router: Any) -> int:
    return int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1)


def slice_router(router: nn.Module, kept: Tensor, experts: int) -> nn.Module:
    """A copy of `router` that knows only the experts `kept`: every tensor with a leading E has those rows, every count
    is M.
    """
    sliced = copy.copy(router)
    sliced.__dict__ = dict(router.__dict__)
    sliced.__dict__.pop("forward", None)  # the wrapper that routing put on this instance
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(router, kind).items()
        setattr(sliced, kind, {name: _rows(tensor, kept, experts) for name, tensor in tensors})
    sliced._modules = {
        name: None if child is None else slice_router(child, kept, experts) for name, child in router._modules.items()
    }
    for name, value in router.__dict__.items():
        if type(value) is int and value == experts and ("expert" in name or name == "out_features"):
            sliced.__dict__[name] = len(kept)
    return sliced


def _rows(tensor: Tensor | None, kept: Tensor, experts: int) -> Tensor | None:
    if tensor is None or experts not in tensor.shape:
        return tensor
    rows = tensor.detach().index_select(tensor.shape.index(experts), kept)
    return nn.Parameter(rows, requires_grad=False) if isinstance(tensor, nn.Parameter) else rows


@dataclass(frozen=True, slots=True)
class GroupLimitedGate:
    """The gate of DeepSeek-V3 and GLM-4 with n_group > 1, under a mask. Slicing would tear its groups apart.

    Forbidden experts count as -inf before the groups are scored, and a group's score is the sum of its two best
    *allowed* experts. The best `topk_group` groups that have an allowed expert are chosen; where these hold fewer than
    `top_k` allowed experts, the next best groups join until there are enough, so no forbidden expert is ever routed to.
    """

    groups: int
    chosen: int
    top_k: int
    scale: float
    renormalise: bool
    bias: Tensor  # [E]

    @classmethod
    def of(cls, router: Any) -> GroupLimitedGate:
        try:
            return cls(
                groups=groups_of(router),
                chosen=int(router.topk_group),
                top_k=int(router.top_k),
                scale=float(router.routed_scaling_factor),
                renormalise=bool(router.norm_topk_prob),
                bias=router.e_score_correction_bias,
            )
        except AttributeError as error:
            raise UnsupportedFamily(
                f"{type(router).__name__} limits its choice to groups, but not in DeepSeek-V3's way ({error})."
            ) from error

    def __call__(self, logits: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` [T, E], `allowed` bool [E] -> weights and index [T, k]."""
        scores = logits.float().sigmoid()  # [T, E]
        choice = (scores + self.bias).masked_fill(~allowed, -torch.inf)  # [T, E]
        open_experts = self._open(choice, allowed)  # [T, E]
        index = choice.masked_fill(~open_experts, -torch.inf).topk(self.top_k, sorted=False).indices  # [T, k]
        weights = scores.gather(1, index)  # [T, k]
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale, index

    def _open(self, choice: Tensor, allowed: Tensor) -> Tensor:
        """Which experts lie in a chosen group: bool [T, E]."""
        grouped = choice.view(len(choice), self.groups, -1)  # [T, G, E/G]
        best = grouped.topk(min(2, grouped.shape[2])).values  # [T, G, 2]
        members = allowed.view(self.groups, -1).sum(1)  # [G]
        score = best.masked_fill(best.isinf(), 0).sum(-1).masked_fill(members == 0, -torch.inf)  # [T, G]
        order = score.argsort(dim=-1, descending=True, stable=True)  # [T, G]
        before = members[order].cumsum(-1) - members[order]  # [T, G] allowed experts in better groups
        rank = torch.arange(self.groups, device=choice.device)  # [G]
        taken = ((rank < self.chosen) | (before < self.top_k)) & (members[order] > 0)  # [T, G]
        chosen = torch.zeros_like(taken).scatter_(1, order, taken)  # [T, G]
        return chosen.unsqueeze(2).expand_as(grouped).flatten(1) & allowed


def check_router(router: Any, forward: Route, hidden: int) -> None:
    """Try a restriction on random tokens. Raises UnsupportedFamily unless it agrees with the router inside the set."""
    weight = next(router.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, hidden, generator=generator).to(weight)  # [T, H]
    logits, weights, index = forward(x)
    ids = set(range(int(router.num_experts)))
    if groups_of(router) == 1:
        ids -= {_unused(ids, index)}
    try:
        own_weights, own_index = restrict(router, sorted(ids)).route(x, logits)
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise UnsupportedFamily(f"{type(router).__name__} can't be limited to a set of experts: {error}") from error
    theirs, ours = (logits.gather(1, chosen).float().sort(-1).values for chosen in (index, own_index))  # [T, k]
    # Logits, not ids, are compared, and loosely: in bfloat16 two experts may tie, and either may be taken.
    if not torch.allclose(theirs, ours, rtol=0.02, atol=0.02):
        raise UnsupportedFamily(
            f"{type(router).__name__} can't be limited to a set of experts: without an expert that it had not chosen, "
            "it "
            "chooses others. Only routers that take the top k of one score per expert are supported."
        )
    ranked, own_ranked = weights.float().sort(-1).values, own_weights.float().sort(-1).values  # [T, k]
    if groups_of(router) > 1 and not torch.allclose(ranked, own_ranked, rtol=0.05, atol=0.01):
        raise UnsupportedFamily(f"{type(router).__name__} weighs experts in another way than DeepSeek-V3's gate.")


def _unused(ids: set[int], index: Tensor) -> int:
    """An expert that no token chose, or one that does not exist where all were chosen."""
    return min(ids - set(index.flatten().tolist()), default=-1)
