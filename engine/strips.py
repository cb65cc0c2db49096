"""Experts in strips: each one's channels are cut into P equal strips, which files, bank and selections know as experts.

To others such a checkpoint is an ordinary model of E*P narrow experts, whose router has every row P times and takes k*P
of them. Here that router is folded: it keeps one row of each P, so a token is given k experts as by the unsplit model,
where copies could tie. Each stands for those of its strips that the token's selection holds.

T tokens, E experts, P strips of each, k experts a token. Strip p of expert e has the number e*P + p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.kernels import pad_rows
from engine.restriction import Routed, call_router, slice_router
from engine.top_k import choosing
from store.errors import CheckpointError, UnsupportedFamily

Listed = list[list[int]]  # [E + 1] lists of P: strips by expert
TRIALS = 8  # tokens
NEAR = 0.02  # of a weight, for bfloat16


@dataclass(frozen=True, slots=True)
class Strips:
    """`experts` is E, `count` P; `share` is what a strip's weight is of its expert's. One strip is the whole expert."""

    experts: int
    count: int = 1
    share: float = 1.0

    @property
    def total(self) -> int:
        """E*P: how many there are, and the number of none."""
        return self.experts * self.count

    def experts_of(self, strips: Sequence[int]) -> Sequence[int]:
        """The experts of which one of `strips`, rising numbers, is a part."""
        return strips if self.count == 1 else list(dict.fromkeys(strip // self.count for strip in strips))

    def of_all(self, routed: Routed) -> Routed:
        """What a router gave, [T, E] and twice [T, k], as of E*P experts of which it takes k*P: all strips."""
        logits, weights, index = routed
        if self.count == 1:
            return routed
        return logits.repeat_interleave(self.count, 1), *self.spread(weights, index)

    def spread(self, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Of experts [T, k] -> of their strips [T, k*P], an expert's in order; none (E) has none (E*P)."""
        strips = torch.arange(self.count, device=index.device)  # [P]
        spread = (index.unsqueeze(2) * self.count + strips).clamp_(max=self.total)  # [T, k, P]
        return self.weights(weights), spread.flatten(1)

    def weights(self, weights: Tensor) -> Tensor:
        """Of experts [T, k] -> of their strips [T, k*P]."""
        shared = weights if self.share == 1 else weights * self.share
        return shared.repeat_interleave(self.count, 1)

    def listed(self, held: Tensor | None = None) -> Listed:
        """The strips of each expert, by number, and of none at last; E*P in place of those that `held` bool [E, P] has
        not. None holds all."""
        numbers = torch.arange(self.total).view(self.experts, self.count)
        here = numbers if held is None else numbers.masked_fill(~held.cpu(), self.total)
        return [*here.tolist(), [self.total] * self.count]


def fold_routers(routers: Sequence[Any], strips: int, top_k: int, hidden: int) -> Strips:
    """Leaves every router one row of each `strips` equal ones, to choose so many times fewer than `top_k`. They have
    their weights, and nobody has adopted them.

    Raises CheckpointError where rows differ, UnsupportedFamily where the folded router says something else.
    """
    experts = int(routers[0].num_experts) // strips
    if strips == 1:
        return Strips(experts)
    return Strips(experts, strips, one_share({_fold(router, strips, top_k, hidden) for router in routers}))


def repeated(router: Any, strips: int, top_k: int) -> Any:
    """A copy of `router` that has every row `strips` times and chooses as many times its `top_k`."""
    rows = torch.arange(int(router.num_experts)).repeat_interleave(strips)  # [E*P]
    return _with_rows(router, rows, top_k * strips)


def share_of(router: Any, folded: Any, strips: int, hidden: int) -> float:
    """What `router` gives a strip, of what `folded` gives its expert: 1 or 1/P, tried on random tokens.

    Raises UnsupportedFamily where neither holds.
    """
    weight = next(router.parameters())
    x = torch.randn(TRIALS, hidden, generator=torch.Generator().manual_seed(3)).to(weight)  # [T, H]
    with torch.inference_mode():
        (_, many, _), (_, few, _) = (call_router(each, pad_rows(x)) for each in (router, folded))
    if many.shape[1] == few.shape[1] * strips:
        mine, theirs = many.float().sum(1), few.float().sum(1) * strips  # [T]
        for share in (1.0, 1.0 / strips):
            if torch.allclose(mine, theirs * share, rtol=NEAR, atol=0.0):
                return share
    raise UnsupportedFamily(
        f"{type(router).__name__} weighs copies of an expert neither alike nor by their number, so an expert's strips "
        "would not add up to it. Serve the model unsplit."
    )


def one_share(shares: set[float]) -> float:
    """Raises UnsupportedFamily where layers disagree."""
    if len(shares) > 1:
        raise UnsupportedFamily(f"Routers weigh the strips of experts by {sorted(shares)}; all layers must agree.")
    return shares.pop()


def _fold(router: Any, strips: int, top_k: int, hidden: int) -> float:
    experts = int(router.num_experts)
    rows = torch.arange(0, experts, strips)  # [E]
    folded = _with_rows(router, rows, top_k // strips)
    again = repeated(folded, strips, top_k // strips)
    for one, other in zip(router.state_dict().values(), again.state_dict().values(), strict=True):
        if one.shape != other.shape or not torch.equal(one, other):
            raise CheckpointError(
                f"config.json says that experts are cut into {strips} strips, but the rows of {type(router).__name__} "
                f"do not come in {strips} equal ones. Pack the model again."
            )
    share = share_of(router, folded, strips, hidden)
    router.__dict__.update(folded.__dict__)
    return share


def _with_rows(router: Any, rows: Tensor, chosen: int) -> Any:
    """A copy that has `rows` of the router's, and chooses `chosen` of them."""
    rows = rows.to(next(router.parameters()).device)
    return choosing(slice_router(router, rows, int(router.num_experts)), chosen)
