"""What remains of the model inside a selection, measured on items that calibration has not seen.

B rows, S length, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from engine.engine import Engine
from engine.guard import WATCH
from engine.requests import FinishedEvent, GenerationRequest, Sampling
from profiler.batches import Encoded, pad, shards, token_limit
from profiler.finite import require_finite
from profiler.statistics import PROMPT, RESPONSE
from store.records import Mode, Selection

SPARE_TOKENS = 4  # room to go on beyond the answer: a model that does not stop there is wrong
ROWS = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """Sums over items, so that parts of the items add up: `right` of `answered` responses, `losses` of `scored` tokens.

    `accuracy` is None where no item has a response; `nll`, in nats a token, is then that of the prompts.
    """

    items: int
    right: int
    answered: int
    losses: float
    scored: int
    covered: float
    levels: tuple[float, ...] = ()  # the lowest that the guard saw in each item, in any order

    @property
    def accuracy(self) -> float | None:
        return self.right / self.answered if self.answered else None

    @property
    def nll(self) -> float:
        return self.losses / max(self.scored, 1)

    @property
    def coverage(self) -> float:
        return self.covered / self.items

    def __add__(self, other: Measured) -> Measured:
        return Measured(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))


def judged_role(encoded: Sequence[Encoded]) -> int:
    """Whose likelihood is measured: the responses' where there are any, else the prompts'."""
    return RESPONSE if any(one.item.response is not None for one in encoded) else PROMPT


def evaluate(
    engine: Engine,
    encoded: Sequence[Encoded],
    selection: Selection | None,
    rows: int = ROWS,
    role: int | None = None,
) -> Measured:
    """Greedy answers against the items' responses, stripped; then the likelihood of the responses, teacher-forced.

    None means the whole model, routed freely. `role` is whose likelihood counts where these are part of more items.
    Raises BudgetError if the selection does not fit.
    """
    batches = list(shards(encoded, min(rows, engine.plan.max_batch), token_limit(engine)))
    finished = [event for batch in batches for event in _generate(engine, batch, selection)]
    answered = [
        event.text.strip() == one.item.response.strip()
        for event, one in zip(finished, encoded, strict=True)
        if one.item.response is not None
    ]
    losses, scored = _likelihood(engine, batches, selection, judged_role(encoded) if role is None else role)
    return Measured(
        items=len(encoded),
        right=sum(answered),
        answered=len(answered),
        losses=losses,
        scored=scored,
        covered=sum(event.served.coverage for event in finished),
        levels=tuple(1.0 if event.served.level is None else event.served.level for event in finished),
    )


def _generate(engine: Engine, batch: Sequence[Encoded], selection: Selection | None) -> list[FinishedEvent]:
    """The rows' ends, in the batch's order. An item without a response makes one token, for its prompt's coverage."""
    mode: Mode = "exact" if selection is None else "auto"
    guard = None if selection is None else WATCH  # which never alarms: the answers are mask mode's
    room = engine.plan.max_context
    lengths = [min(len(one.response) + SPARE_TOKENS, room - len(one.prompt)) if one.response else 1 for one in batch]
    requests = [
        GenerationRequest(one.prompt, selection, mode, Sampling(max_tokens=length), guard=guard)
        for one, length in zip(batch, lengths, strict=True)
    ]
    finished = [event for event in engine.generate(requests) if isinstance(event, FinishedEvent)]
    return sorted(finished, key=lambda event: event.row)


def _likelihood(
    engine: Engine, batches: Sequence[Sequence[Encoded]], selection: Selection | None, role: int
) -> tuple[float, int]:
    """Sum of the negative log likelihoods of the tokens of one role, each given all before it, and their number."""
    total, count = 0.0, 0
    for shard in batches:
        batch = pad(shard)
        logits = engine.forward(batch.ids, batch.mask, [selection] * len(shard))  # [B, S, V]
        scored = (batch.mask[:, 1:] == 1) & (batch.roles[:, 1:] == role)  # [B, S - 1]
        guessed = logits[:, :-1].cpu()[scored].float()  # [n, V]
        losses = torch.nn.functional.cross_entropy(guessed, batch.ids[:, 1:][scored], reduction="none")  # [n]
        require_finite(losses)
        total += float(losses.double().sum())
        count += int(scored.sum())
    return total, count
