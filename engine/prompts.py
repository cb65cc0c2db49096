"""Prompts on their way: padded on the left, so that they end at the same column; equal ones go through once.

What goes through is a *stem*: a text and the selection it is routed in. Rows that want the same share one, and at the
end each gets its keys and values: the first in place, the others as copies in rows of their own. Whatever they become,
they are what they would be alone, for it is what each would have sent. G stems, B rows, S columns so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.group import Group, closed_ranks
from engine.requests import Score
from engine.row import Paging, Row
from engine.sweep import Sweep
from store.errors import MoepagerError
from store.records import Selection

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.kvcache import KvCache

PAD = 0  # any token: padding is masked everywhere

Stem = tuple[tuple[int, ...], Selection | None]


class Prompts(Group):
    """Until there are `logits`, the model's rows are stems; from then on each row has its own."""

    def __init__(self, engine: Engine, rows: Sequence[Row], cache: KvCache) -> None:
        """`cache` is a window with a place for every row."""
        self.logits: Tensor | None = None  # [B, V], of the prompts' last tokens
        self._sweep: Sweep | None = None  # columns that are between two decoder layers
        stems: dict[Stem, int] = {}
        self._stem_of = [stems.setdefault((row.sent_first, row.request.selection), len(stems)) for row in rows]
        super().__init__(engine, rows, cache)
        cache.keep(range(len(stems)))
        lengths = torch.tensor([len(text) for text, _ in stems], device=engine.device)  # [G]
        width = int(lengths.max())
        self._full = (torch.arange(width, device=engine.device) >= width - lengths.unsqueeze(1)).long()  # [G, width]
        self._ids = torch.full((len(stems), width), PAD, device=engine.device)  # [G, width]
        for place, (text, _) in enumerate(stems):
            self._ids[place, width - len(text) :] = torch.tensor(text, device=engine.device)

    @property
    def waits_exactly(self) -> bool:
        """Whether exact prompts are on their way."""
        return self.logits is None and bool(self.exact)

    @property
    def at_start(self) -> bool:
        """Whether nothing of them went through yet."""
        return self.cache.length == 0

    def advance(self, tokens: int) -> None:
        """Send the next columns of about `tokens` tokens through. After the last one there are `logits`."""
        start, (stems, width) = self.cache.length, self._ids.shape
        end = min(width, start + max(1, tokens // stems))
        with self._heard() as heard:
            logits = self._forward(self._ids[:, start:end], self._full[:, :end])
        for hidden in heard:
            self._score(hidden, start, end)
        self._reached(end, logits)

    def advance_layer(self, tokens: int, carried: int) -> None:
        """As `advance`, but so that no expert is paged in for each chunk anew: up to `carried` tokens go through the
        next decoder layer, in chunks of half of `tokens`. Where one pass can take all that is left, it does."""
        start, (stems, width) = self.cache.length, self._ids.shape
        if self._sweep is None:
            if (width - start) * stems <= tokens:
                self.advance(tokens)
                return
            end = min(width, start + max(1, carried // stems))
            self._sweep = Sweep(self._engine.passes, start, end, max(1, tokens // 2 // stems))
        try:
            with Paging(self._engine, self.rows):
                self._sweep_on(self._sweep)
        except MoepagerError:
            self.cache.rewind(self._sweep.start)
            self._sweep = None
            raise

    def _sweep_on(self, sweep: Sweep) -> None:
        parts = self._ids, self._full, self.cache, self.routing
        if not sweep.at_last:
            sweep.carry(*parts)
            return
        with self._heard() as heard:
            for start, end, last in sweep.end_chunks(*parts):
                logits = last
                while heard:
                    self._score(heard.pop(), start, end)
        self._sweep = None
        self._reached(sweep.end, logits)

    def _heard(self) -> AbstractContextManager[list[Tensor]]:
        """Hidden states of the passes made in the block, where somebody wants his prompt scored."""
        scored = any(row.request.sampling.prompt_logprobs for row in self.rows)
        return self._engine.head.listening() if scored else nullcontext([])

    def _reached(self, end: int, logits: Tensor) -> None:
        self.mask = self._full[:, :end]  # [G, S]
        if end == self._ids.shape[1]:
            self._part(logits)

    def _part(self, logits: Tensor) -> None:
        """From `logits` [G, V] on, rows that shared a stem go on each by itself."""
        firsts = [self._stem_of.index(stem) for stem in range(len(logits))]
        others = [place for place in range(len(self.rows)) if place not in firsts]
        copied = [self._stem_of[place] for place in others]
        stems = [*range(len(firsts)), *copied]
        self.rows = [self.rows[place] for place in (*firsts, *others)]
        self.logits = logits[stems]
        if copied:
            self.cache.fork(copied)
            self.mask = self.mask[stems]
            self.routing = self.routing.select(stems, self._selections())

    def _score(self, hidden: Tensor, start: int, end: int) -> None:
        """The prompts' own tokens, by what `hidden` [G, end - start, H] says of the next column."""
        last = min(end, self._ids.shape[1] - 1)
        found: dict[tuple[int, int], list[Score]] = {}
        for stem, row in zip(self._stem_of, self.rows, strict=True):
            wanted = row.request.sampling
            if not wanted.prompt_logprobs or wanted.logprobs is None or row.tokens:  # escalated later: they are out
                continue
            if not row.prompt_scores:
                row.prompt_scores.append(Score(row.request.prompt[0], None))
            if (stem, wanted.logprobs) not in found:
                first = max(start, self._ids.shape[1] - len(row.request.prompt))  # where its padding ends
                tokens = self._ids[stem, first + 1 : last + 1].tolist()
                columns = hidden[stem, first - start : last - start]  # [n, H]
                found[stem, wanted.logprobs] = self._engine.head.scores(columns, tokens, wanted.logprobs)
            row.prompt_scores += found[stem, wanted.logprobs]

    def coverage(self) -> list[float]:
        shares = super().coverage()
        return shares if self.logits is not None else [shares[stem] for stem in self._stem_of]

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the rows at `places` alone. A stem stays as long as one row wants it."""
        if self.logits is not None or len(places) == len(self.rows):
            super().keep(places)
            return
        self._close_all_but(places)
        self.rows = [self.rows[place] for place in places]
        wanted = [self._stem_of[place] for place in places]
        order = closed_ranks(sorted(set(wanted)))
        self._stem_of = [order.index(stem) for stem in wanted]
        self._go_on_with(order)

    def _go_on_with(self, order: Sequence[int]) -> None:
        super()._go_on_with(order)
        if self.logits is None:
            self._ids, self._full = self._ids[order], self._full[order]
            if self._sweep is not None:
                self._sweep.keep(order)
        else:
            self.logits = self.logits[order]

    def _selections(self) -> list[Selection | None]:
        if self.logits is not None:
            return super()._selections()
        readers = [self.rows[self._stem_of.index(stem)] for stem in range(len(set(self._stem_of)))]
        return [row.request.selection for row in readers]

    def _narrow(self) -> None:
        """Columns are counted from the prompts' common start: they stay as long as prompts are on their way."""
