"""One request on its way through a batch: its tokens, its text, its lease, its receipt. Knows no tensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from engine.guard import Escalated
from engine.requests import FinishedEvent, GenerationRequest, Reason, Score, Served, Submission, TokenEvent
from engine.sampling import Sampler
from engine.text import Detokenizer, StopFilter
from store.errors import CheckpointError, OffTask

if TYPE_CHECKING:
    from engine.bank import Lease
    from engine.engine import Engine


class Row:
    """Admitted when it is made. `close` gives its lease back."""

    def __init__(self, engine: Engine, number: int, request: GenerationRequest, submission: Submission) -> None:
        self.number, self.request = number, request
        self.escalated: Escalated | None = None
        self._asked = request
        self.sampler = Sampler(request.sampling, request.prompt, engine.tokenizer.eos)
        self.generated: list[int] = []
        self.last = -1  # the newest token: sampled, not yet sent through the model
        self.experts_paged = self.bytes_paged = 0
        self.paging_seconds = self._ttft_seconds = 0.0
        self.there = request.selection is None  # whether all experts that it leased are in memory
        self.lag = 0  # columns of the cache since its last one, in which it stood still
        self.gave_way = False  # its prompt was on its way before its experts were there, and made room for others
        self._engine = engine
        self._level = 1.0  # the lowest that its guard saw
        self._covered = 1.0  # of the part before it was escalated
        self._void = False
        self._begin_text()
        self._text = ""
        self.prompt_scores: list[Score] = []
        self._scores: list[Score] = []
        self._submission = submission
        self._queued_seconds = time.perf_counter() - submission.at
        self._stack = ExitStack()
        self._lease: Lease | None = None

    @property
    def tokens(self) -> int:
        """How many were sampled."""
        return len(self.generated)

    @property
    def columns(self) -> int:
        """The columns of the cache that it needs once its prompt went through: all it was sent, and those since then in
        which it stood still."""
        return len(self.request.prompt) + max(0, self.tokens - 1) + self.lag

    @property
    def sent_first(self) -> tuple[int, ...]:
        """What goes through the model before the next token is sampled: the prompt, and what was escalated after it."""
        return (*self.request.prompt, *self.generated)

    def strays(self, level: float) -> bool:
        """Whether its guard, if it has one, wants it finished exactly."""
        if self.request.guard is None:
            return False
        self._level = min(self._level, level)
        return level < self.request.guard.bound

    @property
    def may_read(self) -> bool:
        """Whether it may be finished exactly: in the background only where every expert is in memory already."""
        return self.request.priority != "background" or self._engine.bank.whole

    @property
    def refusal(self) -> OffTask:
        """What a background request is told that its guard stops."""
        assert self.request.guard is not None
        return OffTask(
            f"This background request left its task's experts: coverage {self._level:.3g} after {self.tokens} tokens, "
            f"its guard's bound is {self.request.guard.bound:.3g}. To finish it exactly, others would be read, and "
            "background requests cause no swap. Send it in mode mask to have it finished with these experts, or "
            "without the background priority; as it is, it would be refused again."
        )

    @property
    def no_numbers(self) -> CheckpointError:
        """What a request is told to which the model says NaN or infinity."""
        return CheckpointError(
            f"The model's logits for this request are not finite (NaN or infinity) after {self.tokens} tokens of its "
            "answer: weights that it goes through are damaged, or its numbers overflow. Compare the checkpoint with "
            "its source, or serve it in float32."
        )

    def escalate(self, coverage: float) -> None:
        """From now on it is an exact request: its text so far is read anew by free routing. Its lease is given back."""
        guard = self.request.guard
        assert guard is not None, self.number
        if self.request.restarts:
            self._begin_again()
        self.paging_seconds, self._lease = self.swap_seconds, None
        self._stack.close()
        self.escalated = Escalated(self.tokens, self._level, guard.bound)
        self._covered = coverage
        self.request = replace(self.request, mode="exact", selection=None, guard=None)
        if not self.tokens:
            self.prompt_scores.clear()

    def _begin_again(self) -> None:
        """Nobody has read its tokens: they are void."""
        request = self.request
        self._void = bool(self.generated)
        self.sampler = Sampler(request.sampling, request.prompt, self._engine.tokenizer.eos)
        self.generated.clear()
        self._scores.clear()
        self._text = ""
        self._begin_text()

    def _begin_text(self) -> None:
        sampling = self.request.sampling
        self._detokenizer = Detokenizer(self._engine.tokenizer, channels=sampling.channels)
        self._stops = StopFilter(sampling.stop, include=sampling.include_stop)

    def lease(self) -> None:
        """Hold the row's experts, if it has a selection, and begin to read those that are missing.

        Rows that share experts share their cost: the first pays.
        """
        if self.request.selection is None:
            self._engine.bank.residency.begin_turn()
            return
        self._lease = self._stack.enter_context(self._engine.lease(self.request.selection, ahead=True))
        self.experts_paged, self.bytes_paged = self._lease.experts_paged, self._lease.bytes_paged
        self.poll()

    def poll(self, seconds: float = 0.0) -> bool:
        """Whether its experts are there, after waiting for at most `seconds`. Raises what made their read fail."""
        if not self.there and self._lease is not None:
            self.there = self._engine.bank.poll(self._lease, seconds)
        return self.there

    @property
    def missing_seconds(self) -> float:
        """How long its experts still need to come, at the disk's usual speed."""
        missing = 0 if self.there or self._lease is None else self._engine.bank.missing_bytes(self._lease)
        return missing / self._engine.admission.bytes_per_second

    @property
    def swap_seconds(self) -> float:
        """How long the reads took that it paid for."""
        return self.paging_seconds + (0.0 if self._lease is None else self._lease.seconds)

    def begin_anew(self) -> None:
        """Its prompt gave way to others and will go through once more."""
        self.gave_way = True
        self.prompt_scores.clear()

    def close(self) -> None:
        self._stack.close()

    def take(self, token: int, score: Score | None) -> tuple[TokenEvent, Reason | None]:
        """Account for a sampled token; a reason where it is the row's last."""
        prompt_scores = () if self.tokens else tuple(self.prompt_scores)
        if not self.tokens:
            self._ttft_seconds = time.perf_counter() - self._submission.at
        self.generated.append(token)
        self.last = token
        text, reason = self._read(token)
        self._text += text
        if score is not None:
            self._scores.append(score)
        if reason == "stop" and self.sampler.shortened:
            reason = "length"
        anew, self._void = self._void, False
        return TokenEvent(self.number, token, text, score, prompt_scores, anew), reason

    def _read(self, token: int) -> tuple[str, Reason | None]:
        sampling = self.request.sampling
        if token in sampling.stop_tokens or (token in self._engine.tokenizer.eos and not sampling.ignore_eos):
            return self._rest("", "stop")
        text = self._detokenizer.push(token)
        if self.tokens > sampling.min_tokens:
            text = self._stops.push(text)
        if self._stops.stopped:
            return text, "stop"
        if self.sampler.ended:
            return self._rest(text, "stop")
        if self.tokens < sampling.max_tokens:
            return text, None
        return self._rest(text, "length")

    def _rest(self, text: str, reason: Reason) -> tuple[str, Reason]:
        """`text` and all that was held back, up to a stop string in it."""
        text += self._stops.push(self._detokenizer.flush())
        return (text, "stop") if self._stops.stopped else (text + self._stops.flush(), reason)

    def finished(self, reason: Reason, coverage: float) -> FinishedEvent:
        request, card = self.request, self._engine.card
        served = Served(
            mode=self._asked.mode,
            coverage=coverage if self.escalated is None else self._covered,
            experts=card.layers * card.experts if request.selection is None else len(request.selection),
            experts_paged=self.experts_paged,
            bytes_paged=self.bytes_paged,
            swap_ms=1000 * self.swap_seconds,
            ttft_ms=1000 * self._ttft_seconds,
            resident_bytes=self._engine.bank.resident_bytes,
            queue_ms=1000 * self._queued_seconds,
            predicted=self._submission.predicted,
            level=self._level if self._asked.guard is not None else None,
            escalated=self.escalated,
        )
        scores, prompt_scores = tuple(self._scores), tuple(self.prompt_scores)
        return FinishedEvent(
            self.number, reason, self._text, len(request.prompt), self.tokens, served, scores, prompt_scores
        )


class Paging:
    """Shares what a pass paged in among its exact rows; mask rows paid at their lease."""

    def __init__(self, engine: Engine, rows: Sequence[Row]) -> None:
        self._paged, self._rows = engine.bank.paged, [row for row in rows if row.request.mode == "exact"]
        self._before = (0, 0, 0.0)

    def __enter__(self) -> None:
        self._before = (self._paged.experts, self._paged.bytes_needed, self._paged.seconds)

    def __exit__(self, *_: object) -> None:
        experts, needed, seconds = self._before
        for place, row in enumerate(self._rows):
            row.experts_paged += _share(self._paged.experts - experts, place, len(self._rows))
            row.bytes_paged += _share(self._paged.bytes_needed - needed, place, len(self._rows))
            row.paging_seconds += self._paged.seconds - seconds  # all of them waited


def _share(total: int, place: int, rows: int) -> int:
    """Whole shares that add up to the total."""
    return total // rows + (place < total % rows)
