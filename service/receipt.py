"""The receipt of an answer: what it was served from. Filled from what the engine served; nothing here is estimated but
what is called predicted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from engine.guard import Escalated, Guard
from engine.requests import Priority
from store.records import Mode

Reason = Literal["pinned", "retrieved", "session", "below-threshold", "no-tasks", "no-text"]


@dataclass(frozen=True, slots=True)
class Receipt:
    """`task` is what retrieval (or the request) named; `served_task` is whose profile was used, which differs for a
    generalist. `keep` is 1.0 and `profile_id` None in exact mode: every expert was within reach. `active` is the share
    of a token's calls of experts that was made, `calls` how many those are in each layer; 1.0 and None: all. What the
    swap would
    cost was predicted when the request was submitted; null in exact mode, where only the routing tells.

    In mode auto `guard` is the bound and what it rests on, `level` the lowest that it saw. Where it `escalated` the
    answer, the tokens from `at_token` on were routed freely; `coverage` is that of the part before.

    `doubts` are the profiler's about the profile that served: such a profile is served by its evidence all the same."""

    task: str | None
    similarity: float | None
    mode: Mode
    keep: float
    coverage: float | None
    level: float | None
    guard: Guard | None
    escalated: Escalated | None
    experts: int
    experts_paged: int
    bytes_paged: int
    swap_ms: float
    predicted_bytes: int | None
    predicted_swap_ms: float | None
    ttft_ms: float
    queue_ms: float
    resident_bytes: int
    model: str
    profile_id: str | None
    reason: Reason
    served_task: str | None
    scorer: str | None
    stand_in: str | None
    active: float
    calls: tuple[int, ...] | None
    selection: str | None
    prompt_tokens: int
    completion_tokens: int
    priority: Priority
    ignored: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    def json(self) -> dict[str, Any]:
        """Field by field: `asdict` copies all deeply, and took a tenth of what the service adds to an answer."""
        said = {name: getattr(self, name) for name in self.__slots__}
        guard, escalated = (None if one is None else asdict(one) for one in (self.guard, self.escalated))
        lists = {"ignored": list(self.ignored), "doubts": list(self.doubts), "calls": self.calls and list(self.calls)}
        return {**said, "guard": guard, "escalated": escalated, **lists}
