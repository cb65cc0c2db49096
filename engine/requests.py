"""What is asked of the engine and what comes back: plain values, no tensors."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Literal

from engine.constraints import Constraint
from engine.guard import Escalated, Guard
from store.errors import InvalidInput, MoepagerError
from store.records import Mode, Selection

MAX_STOPS = 16
MAX_LOGPROBS = 20  # likeliest tokens beside the one that was taken
RANGES = {
    "temperature": (0, 2),
    "min_p": (0, 1),
    "top_k": (0, 2**31),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}

Reason = Literal["stop", "length", "cancelled"]
Priority = Literal["normal", "background"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and when to stop. Applied in the order of `engine.sampling.Sampler`.

    `temperature` 0 is greedy. `seed` None draws one. The same seed and prompt give the same text in any batch. `top_k`
    0 keeps all. `bias` is added to the logits of its tokens. `include_stop` leaves the stop string in the text.
    `ignore_eos` generates past the model's end tokens, which are still no text: for benchmarks of equal lengths.
    `logprobs` asks for every token's own log-probability and those of so many likeliest tokens, `prompt_logprobs` for
    those of the prompt as well. `max_tokens` 0 is a prompt that is only scored. `channels` leaves the marks of channels
    in the text (engine/harmony.py); only a model that has them knows what it means.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    channels: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise _refused(name, f"between {low} and {high}", getattr(self, name))
        self._check_counts()
        if not 0 < self.top_p <= 1:
            raise _refused("top_p", "above 0 and at most 1", self.top_p)
        if not 0 < self.repetition_penalty <= 10:
            raise _refused("repetition_penalty", "above 0 and at most 10", self.repetition_penalty)
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise _refused("seed", "a 64-bit whole number", self.seed)
        if not all(self.stop):
            raise InvalidInput("A stop string must not be empty.", param="stop")
        if len(self.stop) > MAX_STOPS:
            raise InvalidInput(f"At most {MAX_STOPS} stop strings are allowed, got {len(self.stop)}.", param="stop")

    def _check_counts(self) -> None:
        least = 0 if self.prompt_logprobs else 1
        if self.max_tokens < least:
            raise _refused("max_tokens", f"at least {least}", self.max_tokens)
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise _refused("min_tokens", f"between 0 and max_tokens ({self.max_tokens})", self.min_tokens)
        if self.prompt_logprobs and self.logprobs is None:
            raise InvalidInput("prompt_logprobs needs logprobs, which says how many.", param="logprobs")
        if self.ignore_eos and self.constraint is not None:
            raise InvalidInput("ignore_eos can't go with a constraint, which says where to end.", param="ignore_eos")


def _refused(name: str, wanted: str, got: object) -> InvalidInput:
    return InvalidInput(f"{name} must be {wanted}, got {got}.", param=name)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One row of a batch.

    `mode` "mask" routes only inside `selection`; "exact" routes freely and takes no selection; "auto" begins as mask
    and is finished exactly once its `guard` says so: from the next token on, or, where it `restarts` because nobody has
    read its first tokens yet, all of it. One of priority "background" never makes others wait for its experts. Requests
    of one `session` follow each other where they can.
    """

    prompt: tuple[int, ...]
    selection: Selection | None
    mode: Mode
    sampling: Sampling = field(default_factory=Sampling)
    cancelled: threading.Event = field(default_factory=threading.Event)
    priority: Priority = "normal"
    session: str | None = None
    guard: Guard | None = None
    restarts: bool = False

    def __post_init__(self) -> None:
        if (self.mode == "exact") == (self.selection is not None):
            raise InvalidInput(
                f"Mode {self.mode!r} came with {'no' if self.selection is None else 'a'} selection; modes mask and "
                "auto need one, exact mode takes none.",
                param="mode",
            )
        if (self.mode == "auto") != (self.guard is not None):
            raise InvalidInput(
                f"Mode {self.mode!r} came with {'no' if self.guard is None else 'a'} guard; mode auto needs one, the "
                "others take none.",
                param="mode",
            )


@dataclass(frozen=True, slots=True)
class SwapCost:
    """What a request would wait for: bytes to read, and how long that takes on a disk that reads nothing else."""

    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Submission:
    """When a request was submitted, by time.perf_counter, and what it would have cost then."""

    at: float
    predicted: SwapCost | None


@dataclass(frozen=True, slots=True)
class Served:
    """What a request was really served from.

    `experts` it could be routed to; paged ones are those it had to wait for. `ttft_ms` counts from when it was
    submitted, `queue_ms` up to when it was admitted to a batch, its experts paged in from then on. `predicted` is what
    they would have cost as things stood when it was submitted; None where only the routing will tell (exact mode).

    Of mode auto, `level` is the lowest that the guard saw. Where it was `escalated`, `coverage` is that of the part
    inside the selection, and `experts` are all there are.
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
    predicted: SwapCost | None = None
    level: float | None = None
    escalated: Escalated | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """What the model itself gave a token, before any option of sampling: natural logarithms of probabilities.

    `logprob` is None for the first token of a prompt, which nothing precedes; `top` are the likeliest, best first.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One sampled token and the text that it completed: often "", where a character or a stop string may still
    follow. `score` where log-probabilities were asked for; the row's first one brings the prompt's, if they were.

    `anew`: all tokens before this one are void, the answer begins with it (a request that restarts, and did).
    """

    row: int
    token: int
    text: str
    score: Score | None = None
    prompt_scores: tuple[Score, ...] = ()
    anew: bool = False


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """The row's last event. `text` is all of it: the texts of its TokenEvents, joined; so are `scores` theirs. Of a row
    that began anew, those from then on.

    `prompt_scores` has one of each token of the prompt, where they were asked for.
    """

    row: int
    reason: Reason
    text: str
    prompt_tokens: int
    completion_tokens: int
    served: Served
    scores: tuple[Score, ...] = ()
    prompt_scores: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class FailedEvent:
    """The row ended by an error that was its own; the other rows of the batch go on."""

    row: int
    error: MoepagerError


Event = TokenEvent | FinishedEvent
