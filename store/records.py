"""The words every room shares: frozen values, numpy at most. Layers count MoE layers, from 0; layer before expert."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

Mode = Literal["mask", "exact", "auto"]

GENERALIST = "generalist"  # the task that stands for all of them: its profile serves queries that match none
NO_TASK = "none"  # what headers and metrics say of a query that has no task, so no task may be called so


class ExpertKey(NamedTuple):
    """Which expert: the ordinal of its MoE layer, then its id inside that layer."""

    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class StandIn:
    """Vectors that stand in for experts that are left out, f32 `[L, E, H]`; `id` names model, text and kind."""

    id: str
    vectors: F32 = field(compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes


@dataclass(frozen=True, slots=True)
class Selection:
    """The experts that a request may be routed to: for each MoE layer a sorted tuple of expert ids.

    With a `stand_in` the router chooses among all experts, and the vectors of those that are not here take their place.
    `calls` says for each layer how many experts a token is routed to, at least one; None: the model's own top-k
    everywhere.
    """

    experts: tuple[tuple[int, ...], ...]
    stand_in: StandIn | None = None
    calls: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for layer, ids in enumerate(self.experts):
            if list(ids) != sorted(set(ids)) or (ids and ids[0] < 0):
                raise ValueError(
                    f"Layer {layer} of a selection must list distinct expert ids in rising order, got {ids}."
                )
        if self.calls is not None and (len(self.calls) != len(self.experts) or min(self.calls, default=1) < 1):
            raise ValueError(
                f"A selection of {len(self.experts)} layers needs as many numbers of calls, each at least 1; got "
                f"{self.calls}."
            )

    @classmethod
    def whole(cls, layers: int, experts: int) -> Selection:
        return cls(tuple(tuple(range(experts)) for _ in range(layers)))

    @classmethod
    def of(cls, layers: Sequence[Sequence[int]], stand_in: StandIn | None = None) -> Selection:
        return cls(tuple(tuple(sorted(int(e) for e in ids)) for ids in layers), stand_in)

    def __iter__(self) -> Iterator[ExpertKey]:
        for layer, ids in enumerate(self.experts):
            for expert in ids:
                yield ExpertKey(layer, expert)

    def __len__(self) -> int:
        return sum(map(len, self.experts))

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name this exact set, what stands in for the others, and how many a token calls."""
        named = repr(self.experts) + (f" {self.stand_in.id}" if self.stand_in else "")
        named += f" calls {self.calls}" if self.calls else ""
        return hashlib.sha256(named.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model as the store knows it. `fingerprint` covers config, weights and tokenizer."""

    fingerprint: str
    name: str
    family: str
    layers: int
    experts: int
    top_k: int
    config_hash: str
    weights_hash: str
    tokenizer_hash: str


@dataclass(frozen=True, slots=True)
class TaskRecord:
    name: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Exemplar:
    """One query of a task, embedded. `vector` is f32 [d], of length 1, made by `embedder`."""

    task: str
    text: str
    vector: F32 = field(compare=False)
    embedder: str = ""


UNJUDGED = (
    "This profile was stored before profiles were judged, so nobody knows how far to trust it: profile its text again, "
    "which runs no forward."
)


@dataclass(frozen=True, slots=True)
class Trust:
    """How far a profile's statistics can be trusted: figures, and what they give to doubt, in words.

    `tokens_per_expert` is a mean over experts, `skew` (1 is chance) a median over layers and `least_skew` the lowest of
    a layer; `unseen` is the share of all experts that no token reached, `agreement` the share of experts on which two
    halves of the text agree at a half (None where one half is empty). `surprise`: by how many nats a token the model
    finds the text less likely than even odds over its vocabulary (None where that was not measured).
    """

    tokens_per_expert: float
    unseen: float
    skew: float
    least_skew: float
    agreement: float | None
    doubts: tuple[str, ...] = ()
    surprise: float | None = None

    @property
    def figures(self) -> dict[str, float | None]:
        return {name: value for name, value in asdict(self).items() if name != "doubts"}


@dataclass(frozen=True, slots=True)
class Profile:
    """A task's expert statistics for one model: f64 arrays `[L, E]` (or smaller), additive over calibration text."""

    id: str
    model: str  # fingerprint
    task: str
    statistics: Mapping[str, npt.NDArray[np.generic]] = field(compare=False)
    tokens: int
    calibration_hash: str
    calibration_items: frozenset[str]  # content hash of every calibration item, for the disjointness rule
    scorers: Mapping[str, str]  # scorer name -> version
    created: datetime
    trust: Trust | None = None  # None: stored before there was a judgement

    @property
    def doubts(self) -> tuple[str, ...]:
        """Why to doubt it; where nobody judged, that."""
        return (UNJUDGED,) if self.trust is None else self.trust.doubts


@dataclass(frozen=True, slots=True, eq=False)
class ProfilePart:
    """The statistics of one part of a task's text. Parts of one `run` add up, each once, to the profile's own."""

    run: str
    number: int  # of 1 to `of`
    of: int
    model: str
    task: str
    statistics: Mapping[str, npt.NDArray[np.generic]]
    created: datetime


@dataclass(frozen=True, slots=True)
class StoredSelection:
    """What a scorer keeps of a profile at a size. `keep` is the share of experts, 1.0 being all of them; with stand-ins
    it is the share whose bytes experts and vectors take together.

    `stand_in` is one of store/stand_ins.py's kinds; a selection as read from the store has no vectors yet. `active` is
    the share of a token's calls of experts that was to be left, 1.0 being all, `calls_by` the rule that shared them out
    to the layers as `selection.calls`.
    """

    id: str
    profile: str
    scorer: str
    allocator: str
    keep: float
    selection: Selection
    stand_in: str = "nothing"
    active: float = 1.0
    calls_by: str = "all"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Evidence: how the model did on held-out items of a task inside a selection. `nll` in nats a response token.

    `levels`, rising, are the lowest level of coverage that the guard saw in each item: mode auto draws its bound from
    them. Empty where nobody looked.
    """

    selection: str
    evaluation_hash: str
    items: int
    accuracy: float | None
    full_accuracy: float | None
    nll: float
    coverage: float
    levels: tuple[float, ...] = ()

    @property
    def retention(self) -> float | None:
        """Accuracy as a share of the whole model's; None where the task has no scorer or that model knows nothing."""
        if self.accuracy is None or not self.full_accuracy:
            return None
        return self.accuracy / self.full_accuracy


@dataclass(frozen=True, slots=True)
class Price:
    """What a selection costs. `text` says whose items it was measured on: the task's own or `others`.

    `low` and `high` bound `accuracy` with 95%, over items and, where there are any, over draws of the calibration text;
    `draws` holds accuracy and nll of the selection that each draw would have given.
    """

    selection: str
    text: Literal["own", "others"]
    evaluation_hash: str
    bytes: int
    items: int
    accuracy: float | None
    full_accuracy: float | None
    low: float | None
    high: float | None
    nll: float
    draws: tuple[tuple[float | None, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """One exemplar found for a query, by cosine similarity."""

    task: str
    text: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Decision:
    """What retrieval decided for one request, kept for audit. `task` is None where nothing was near enough.

    `key` is the id of the API key that asked, `model` a fingerprint; `profile`, `keep` and `active` (the share of a
    token's calls of experts) are what was to serve it, None where it was refused. `id` is the store's: 0 before it is
    there.
    """

    request: str
    query_hash: str
    task: str | None
    nearest: str | None
    similarity: float | None
    threshold: float
    reason: Literal["pinned", "retrieved", "session", "below-threshold", "no-tasks", "no-text"]
    mode: Mode
    created: datetime
    key: str | None = None
    model: str | None = None
    profile: str | None = None
    keep: float | None = None
    active: float | None = None
    id: int = field(default=0, compare=False)


Role = Literal["query", "operator"]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """Who may ask. `digest` is the sha256 of the key, in hex; `per_minute` limits its requests, None does not.

    `tasks`, in order, are all that there is for it; None: every task.
    """

    id: str
    name: str
    role: Role
    digest: str
    per_minute: int | None
    created: datetime
    tasks: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class StoredCorpus:
    """The text that a task is profiled from: its exemplars, and items as `moepager profile` reads them from a file."""

    task: str
    exemplars: tuple[str, ...]
    calibration: tuple[Mapping[str, Any], ...]
    evaluation: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class MadeBy:
    """A request that may be sent again: the sha256 of its caller's key for it, and of what it asked for."""

    key: str
    body: str


@dataclass(frozen=True, slots=True)
class UnmatchedQuery:
    """A query that was near no task, kept because the operator chose to. `count` is how often it was asked."""

    digest: str  # the text's sha256
    text: str  # after redaction
    count: int
    similarity: float | None  # to the nearest task, of the last time
    updated: datetime


EventKind = Literal["drift"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that an operator should look at. `value` passed `bound`; what both mean is the kind's."""

    kind: EventKind
    model: str  # fingerprint
    task: str
    value: float
    bound: float
    detail: str
    created: datetime


JobState = Literal["queued", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, slots=True)
class Job:
    """A profiling run. `progress` between 0 and 1; `detail` says where it is, or why it failed; `options` are those of
    the profiling that its creator chose, by name. `attempt` counts the runners that took it, so the newest one's notes
    can be told from those of one that was thought dead; `deaths` of them died over it."""

    id: str
    model: str
    task: str
    state: JobState
    progress: float
    detail: str
    created: datetime
    updated: datetime
    options: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class JobTally:
    """How many jobs there are in each state, and the seconds since the oldest that has not ended was asked for."""

    counts: Mapping[JobState, int]
    oldest_seconds: float
