"""The model's output layer: what the model thought of tokens at any column, not only after the last one.

H hidden, V vocabulary, n columns of one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from engine.requests import Score
from engine.sampling import scores_of


class Head:
    """`columns` are sent through at once, so that their logits fit the memory that sampling was given."""

    def __init__(self, model: Any, columns: int) -> None:
        self.columns = columns
        self._decoder = model.get_decoder()
        self._output = model.get_output_embeddings()
        self._scaling = float(getattr(model.config, "logits_scaling", 1.0))  # Granite divides by it

    @contextmanager
    def listening(self) -> Iterator[list[Tensor]]:
        """Filled with the hidden states [B, new, H] of the passes that the block makes."""
        heard: list[Tensor] = []
        handle = self._decoder.register_forward_hook(lambda _module, _args, out: heard.append(out[0]))
        try:
            yield heard
        finally:
            handle.remove()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden` [n, H], at most `columns` of them -> f32 [n, V]"""
        assert len(hidden) <= self.columns, (len(hidden), self.columns)
        logits: Tensor = self._output(hidden) / self._scaling
        return logits.float()

    @torch.inference_mode()
    def scores(self, hidden: Tensor, tokens: Sequence[int], top: int) -> list[Score]:
        """`hidden` [n, H] and the token that follows each of its columns."""
        found: list[Score] = []
        for start in range(0, len(tokens), self.columns):
            columns = slice(start, start + self.columns)
            logits = self._output(hidden[columns]) / self._scaling  # [n, V]
            found += scores_of(logits, tokens[columns], top)
        return found
