"""From logits to the next token of each row. Every row draws from its own generator, so a batch never changes its text.

V vocabulary. In this order, a row at a time: what the constraint forbids; ends of text before `min_tokens`; `bias`;
penalties for repetition (of prompt and answer), frequency and presence (of the answer); then the likeliest where
`temperature` is 0, else temperature, `min_p`, `top_k`, `top_p`, and a draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.requests import Sampling, Score

NEVER = float("-inf")


class Sampler:
    """One row's sampling, seeded once. `ends` are the tokens that end a text, `prompt` what was asked."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] = (), ends: frozenset[int] = frozenset()) -> None:
        self.sampling = sampling
        constraint = sampling.constraint
        self.matching = None if constraint is None else constraint.begin(sampling.max_tokens)
        self._ends = sorted(ends | sampling.stop_tokens)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._taken = 0
        self._counts: dict[int, int] = {}  # of the tokens of the answer
        self._prompt = frozenset(prompt) if sampling.repetition_penalty != 1 else frozenset()
        self._penalised = (
            sampling.repetition_penalty != 1 or sampling.frequency_penalty != 0 or sampling.presence_penalty != 0
        )

    @property
    def plain(self) -> bool:
        """The likeliest token is the next one."""
        early = self._taken < self.sampling.min_tokens
        adjusted = self._penalised or self.sampling.bias or early or self.matching is not None
        return self.sampling.temperature == 0 and not adjusted

    def choose(self, logits: Tensor, best: int) -> tuple[int, Score | None]:
        """`logits` [V], of which `best` is the likeliest -> the next token, and its score if that was asked for.

        Raises InvalidInput where the constraint can't be followed any further.
        """
        token = self._take(best if self.plain else self._next(logits))
        if self.sampling.logprobs is None:
            return token, None
        return token, scores_of(logits.unsqueeze(0), [token], self.sampling.logprobs)[0]

    @property
    def ended(self) -> bool:
        """Nothing may follow what the constraint has seen."""
        return self.matching is not None and self.matching.ended

    @property
    def shortened(self) -> bool:
        """The answer was made to end in time."""
        return self.matching is not None and self.matching.shortened

    def _next(self, logits: Tensor) -> int:
        adjusted = self.adjusted(logits)  # [V]
        return int(adjusted.argmax()) if self.sampling.temperature == 0 else self.draw(adjusted)

    def _take(self, token: int) -> int:
        """Remember what was chosen; the constraint may have a better choice."""
        if self.matching is not None:
            token = self.matching.take(token)
        self._taken += 1
        if self._penalised:
            self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits with everything but temperature and what comes after it, f32 [V]."""
        logits = logits.float().clone()  # [V]
        if self.matching is not None:
            allowed = torch.from_numpy(self.matching.allowed()).to(logits.device)  # [V of the tokenizer]
            logits[: len(allowed)].masked_fill_(~allowed[: len(logits)], NEVER)
            logits[len(allowed) :] = NEVER
        if self._taken < self.sampling.min_tokens:
            self._forbid_ends(logits)
        for token, bias in self.sampling.bias:
            logits[token] += bias
        if self._penalised:
            self._penalise(logits)
        return logits

    def _forbid_ends(self, logits: Tensor) -> None:
        """Unless nothing else is allowed."""
        without = logits.clone()
        without[self._ends] = NEVER
        if bool((without > NEVER).any()):
            logits.copy_(without)

    def _penalise(self, logits: Tensor) -> None:
        sampling = self.sampling
        seen = sorted(self._prompt | self._counts.keys())
        if sampling.repetition_penalty != 1 and seen:
            found = logits[seen]
            logits[seen] = torch.where(
                found > 0, found / sampling.repetition_penalty, found * sampling.repetition_penalty
            )
        for token, count in self._counts.items():
            logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty

    def draw(self, logits: Tensor) -> int:
        """`logits` f32 [V] -> a token.

        One random number a token, turned into a token by the cumulative distribution.
        """
        scaled = logits.double() / self.sampling.temperature  # [V]
        probabilities, order = scaled.softmax(-1).sort(descending=True, stable=True)  # [V], [V]
        probabilities = probabilities[: self._likely(probabilities)]  # [n]
        probabilities = probabilities / probabilities.sum()
        cumulative = probabilities.cumsum(-1)  # [n]
        kept = int((cumulative - probabilities < self.sampling.top_p).sum())  # the smallest set that holds top_p
        point = torch.rand((), dtype=torch.float64, generator=self._generator).to(logits.device) * cumulative[kept - 1]
        place = int(torch.searchsorted(cumulative[:kept], point, right=True).clamp(max=kept - 1))
        return int(order[place])

    def _likely(self, probabilities: Tensor) -> int:
        """How many of the sorted `probabilities` [V] `min_p` and `top_k` leave: one at least, none of zero."""
        least = self.sampling.min_p * probabilities[0]
        count = int(((probabilities >= least) & (probabilities > 0)).sum())
        return min(count, self.sampling.top_k) if self.sampling.top_k else count


def scores_of(logits: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
    """`logits` [n, V] and the tokens that followed -> each one's score with the `top` likeliest."""
    logprobs = logits.float().log_softmax(-1)  # [n, V]
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))[:, 0].tolist()
    values, order = (found.tolist() for found in logprobs.topk(min(top, logits.shape[1]), dim=-1))  # [n, top]
    likeliest = [tuple(zip(places, found, strict=True)) for places, found in zip(order, values, strict=True)]
    return [Score(token, value, best) for token, value, best in zip(tokens, own, likeliest, strict=True)]
