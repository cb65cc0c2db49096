"""What is asked of the engine and what comes back: plain values, no tensors."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

from store.errors import InvalidInput, MoepagerError
from store.records import Mode, Selection

MAX_STOPS = 16

Reason = Literal["stop", "length", "cancelled"]
Priority = Literal["normal", "background"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy. `seed` None draws one. The same seed and prompt give the same text in any batch.

    `ignore_eos` generates past the model's end tokens, which are still no text: for benchmarks of equal lengths.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidInput(f"max_tokens must be at least 1, got {self.max_tokens}.", param="max_tokens")
        if not 0 <= self.temperature <= 2:
            raise InvalidInput(f"temperature must be between 0 and 2, got {self.temperature}.", param="temperature")
        if not 0 < self.top_p <= 1:
            raise InvalidInput(f"top_p must be above 0 and at most 1, got {self.top_p}.", param="top_p")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise InvalidInput(f"seed must be a 64-bit whole number, got {self.seed}.", param="seed")
        if not all(self.stop):
            raise InvalidInput("A stop string must not be empty.", param="stop")
        if len(self.stop) > MAX_STOPS:
            raise InvalidInput(f"At most {MAX_STOPS} stop strings are allowed, got {len(self.stop)}.", param="stop")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One row of a batch.

    `mode` "mask" routes only inside `selection`; "exact" routes freely and takes no selection. One of priority
    "background" never makes others wait for its experts. Requests of one `session` follow each other where they can.
    """

    prompt: tuple[int, ...]
    selection: Selection | None
    mode: Mode
    sampling: Sampling = field(default_factory=Sampling)
    cancelled: threading.Event = field(default_factory=threading.Event)
    priority: Priority = "normal"
    session: str | None = None

    def __post_init__(self) -> None:
        if (self.mode == "mask") != (self.selection is not None):
            raise InvalidInput(
                f"Mode {self.mode!r} came with {'no' if self.selection is None else 'a'} selection; mask mode needs "
                "one, exact "
                "mode takes none.",
                param="mode",
            )


@dataclass(frozen=True, slots=True)
class Served:
    """What a request was really served from.

    `experts` it could be routed to; paged ones are those it had to wait for. `ttft_ms` counts from when it was
    submitted, `queue_ms` up to when it was admitted to a batch, its experts paged in from then on.
    """

    mode: Mode
    coverage: float
    experts: int
    experts_paged: int
    bytes_paged: int
    swap_ms: float
    ttft_ms: float
    resident_bytes: int
    queue_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token and the text that it completed: often "", where a character or a stop string may still
    follow.
    """

    row: int
    token: int
    text: str


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The row's last event. `text` is all of it: the texts of its TokenEvents, joined."""

    row: int
    reason: Reason
    text: str
    prompt_tokens: int
    completion_tokens: int
    served: Served


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The row ended by an error that was its own; the other rows of the batch go on."""

    row: int
    error: MoepagerError


Event = TokenEvent | FinishedEvent
