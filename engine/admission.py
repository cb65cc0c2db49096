"""What may run: requests that could ever be served, those that there is room for now, and what one would wait for.

Decides by plan, bank and card; admits and runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.bank import Bank
from engine.card import ModelCard
from engine.plan import MemoryPlan
from engine.reader import Meter
from engine.requests import GenerationRequest, SwapCost
from engine.residency import ABSENT
from engine.switchboard import Switchboard
from store.errors import BudgetError, InvalidInput
from store.records import Selection

GUESSED_BYTES_PER_SECOND = 1e9
LAYER_BYTES = 7e6  # that memory gives in the time in which a step does what reads no weights: a third of a ms a layer


class Admission:
    """Every method may be called from any thread; what it says of room and cost is true for that moment."""

    def __init__(self, card: ModelCard, plan: MemoryPlan, board: Switchboard, bank: Bank, meter: Meter) -> None:
        self._card, self._plan, self._board, self._bank, self._meter = card, plan, board, bank, meter

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidInput or BudgetError for a request that could not be served even alone."""
        self.check_length(len(request.prompt), request.sampling.max_tokens)
        if min(request.prompt) < 0 or max(request.prompt) >= self._card.vocab:
            raise InvalidInput(f"A prompt token is outside the vocabulary of {self._card.vocab}.", param="prompt")
        if request.selection is not None:
            self.check_selection(request.selection)

    def check_length(self, length: int, budget: int, field: str = "prompt") -> None:
        """Raises InvalidInput where a prompt of `length` tokens and `budget` more are none, or more than the context
        holds. `field` is what whoever asks calls the prompt."""
        if not length:
            raise InvalidInput("The prompt is empty. Send at least one token of text.", param=field)
        if length + budget > self._plan.max_context:
            raise InvalidInput(
                f"The prompt has {length} tokens and max_tokens is {budget}, together {length + budget}; the context "
                f"holds {self._plan.max_context}. Shorten the prompt, lower max_tokens, or serve with a larger "
                "max_context.",
                param="max_tokens" if length < self._plan.max_context else field,
                code="context_length_exceeded",
            )

    def check_selection(self, selection: Selection) -> None:
        """Raises InvalidInput or BudgetError for one that was made for another model or fits no empty bank."""
        self._board.check_selection(selection)
        self._plan.require(selection)
        if selection.stand_in is None:
            return
        wanted, got = (self._card.layers, self._card.experts, self._card.hidden), selection.stand_in.vectors.shape
        if got != wanted:
            raise InvalidInput(
                f"The stand-ins {selection.stand_in.id} are {list(got)}, this model has {list(wanted)} (layers, "
                "experts, width). They were made for another model: profile this one.",
                param="selection",
            )

    def check_pass(self, ids: Tensor, mask: Tensor, selections: Sequence[Selection | None]) -> None:
        """Raises InvalidInput for `ids`, `mask` [B, S] that are not of one shape, or too much for one pass."""
        if ids.dim() != 2 or ids.shape != mask.shape or len(selections) != len(ids):
            raise InvalidInput(
                f"forward wants ids and mask of one shape [B, S] and B selections; got {list(ids.shape)}, "
                f"{list(mask.shape)} and {len(selections)}."
            )
        if ids.numel() > self._plan.chunk_tokens:
            raise InvalidInput(
                f"{ids.shape[0]} rows x {ids.shape[1]} positions are {ids.numel()} tokens in one pass; the plan's "
                f"workspace is for {self._plan.chunk_tokens}. Send fewer rows at once, or open the engine with a "
                "larger chunk_tokens."
            )

    def require_free_slot(self, selections: Sequence[Selection | None]) -> None:
        """Raises BudgetError where one routes freely, experts are missing, and no slot is left to page them through."""
        if any(selection is None for selection in selections) and not self._bank.reaches_all:
            raise BudgetError(
                f"Exact mode pages experts through free slots, and leases hold all {self._plan.slots}. "
                "Wait for one to end, or raise the memory budget."
            )

    def has_room(self, selection: Selection | None, *, spare: bool) -> bool:
        """Whether slots are free, beside all leases, for what `selection` lacks, and `spare` one more to page
        through."""
        if selection is not None and not self._board.stand_ins.has_room(selection.stand_in):
            return False
        wanted = self._bank.residency.unpinned(selection or ())
        return wanted + (spare and not self.holds_all) <= self._bank.residency.available

    def missing_bytes(self, selection: Selection | None) -> int:
        """What would have to be read for the selection; None: for every expert there is."""
        table, sizes = self._bank.residency.table, self._bank.expert_bytes
        if selection is None:
            return sum(row.count(ABSENT) * size for row, size in zip(table, sizes, strict=True))
        missing = 0  # every query has this counted: without an object for each expert it takes a fifth of the time
        for row, experts, size in zip(table, selection.experts, sizes, strict=True):
            missing += size * [row[expert] for expert in experts].count(ABSENT)
        return missing

    def share_beside(self, selection: Selection, other: Selection) -> float:
        """Bytes of the experts of `selection` that `other` has not, over what a step of its rows takes: its experts and
        the dense weights, as they lie in memory, and the time of all else in bytes."""
        layers = zip(selection.experts, other.experts, strict=True)
        beside = sum(len(set(ours).difference(theirs)) for ours, theirs in layers)
        step = self._bank.slot_bytes * len(other) + self._plan.dense_bytes + self._plan.layers * LAYER_BYTES
        return self._bank.slot_bytes * beside / step

    def swap_seconds(self, selection: Selection | None) -> float:
        """How long that takes; 0 where nothing is missing."""
        return self.missing_bytes(selection) / self.bytes_per_second

    def predict(self, request: GenerationRequest) -> SwapCost | None:
        """What the request would wait for if it began now; None where its routing decides."""
        missing = self.missing_bytes(request.selection)
        if request.selection is None and missing:
            return None
        return SwapCost(missing, missing / self.bytes_per_second)

    @property
    def bytes_per_second(self) -> float:
        """Of experts that come: measured, the model's other weights at open included.

        Where bytes change on their way, both are done at once, and the slower one is what takes the time.
        """
        measured = (self._meter.bytes_per_second, self._bank.arrivals.way.bytes_per_second)
        return min((speed for speed in measured if speed is not None), default=GUESSED_BYTES_PER_SECOND)

    @property
    def holds_all(self) -> bool:
        """Whether there is a slot for every expert."""
        return self._plan.slots >= self._card.layers * self._card.experts
