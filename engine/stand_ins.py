"""What stands in for experts that a selection leaves out: one vector each. Owns the vectors on the device.

The router stays free over all experts; where it chooses one that was left out, the vector takes the place of that
expert's output. T tokens, E experts, k experts a token, H hidden.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.restriction import Limited, Routed
from store.errors import BudgetError
from store.records import StandIn


@dataclass(frozen=True, slots=True)
class Replacement:
    """One layer of one selection: `allowed` bool [E] are its experts, `vectors` f32 [E, H] stand in for the others.

    `fewer` is the router of all experts that chooses fewer a token, None where it chooses as many as ever.
    """

    allowed: Tensor
    vectors: Tensor
    fewer: Limited | None = None

    @property
    def inside(self) -> Tensor:
        return self.allowed

    def apply(self, x: Tensor, routed: Routed) -> tuple[Tensor, Tensor, Tensor]:
        """`x` [T, H] and what the free router said of it -> weights and index [T, k], with E for what was left out, and
        what that adds, [T, H].
        """
        logits, weights, index = routed
        if self.fewer is not None:
            weights, index = self.fewer(x, logits)
        known = index.clamp(max=len(self.allowed) - 1)  # [T, k] what is nobody's has no weight, and stays nobody's
        outside = ~self.allowed[known]  # [T, k]
        scale = weights.float() * outside  # [T, k]
        added = F.embedding_bag(known, self.vectors, per_sample_weights=scale, mode="sum")  # [T, H]
        return weights, index.masked_fill(outside, len(self.allowed)), added


class DeviceStandIns:
    """At most `limit` sets of vectors on the device: those that are held, and the ones used last."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self._limit, self._device = limit, device
        self._sets: OrderedDict[str, Tensor] = OrderedDict()
        self._held: Counter[str] = Counter()

    def has_room(self, stand_in: StandIn | None) -> bool:
        """Whether it can be held beside all that are."""
        held = +self._held
        return stand_in is None or stand_in.id in held or len(held) < self._limit

    @contextmanager
    def hold(self, stand_in: StandIn | None) -> Iterator[None]:
        """Its vectors stay on the device until the block ends. Raises BudgetError where others take all the room."""
        if stand_in is None:
            yield
            return
        self._put(stand_in)
        self._held[stand_in.id] += 1
        try:
            yield
        finally:
            self._held[stand_in.id] -= 1

    def vectors(self, stand_in: StandIn) -> Tensor:
        """f32 [L, E, H] of one that is held."""
        return self._sets[stand_in.id]

    def _put(self, stand_in: StandIn) -> None:
        if not self.has_room(stand_in):
            raise BudgetError(
                f"{self._limit} sets of stand-ins fit into memory and all are in use or none is allowed. Wait for a "
                "request to end, raise stand_ins (MOEPAGER_STAND_INS), or choose a selection without stand-ins."
            )
        if stand_in.id not in self._sets:
            idle = [name for name in self._sets if not self._held[name]]
            while len(self._sets) >= self._limit:
                del self._sets[idle.pop(0)]
            self._sets[stand_in.id] = torch.from_numpy(stand_in.vectors).to(self._device)  # [L, E, H]
        self._sets.move_to_end(stand_in.id)
