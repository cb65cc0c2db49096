"""How likely the model finds the text: what tells that a tokenizer is another model's, or weights are none.

B rows, S length, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from profiler.batches import Batch
from profiler.finite import require_finite
from profiler.statistics import RESPONSE
from store.records import F64


def hear(head: Callable[[Tensor], Tensor], at_once: int, states: Tensor, batch: Batch) -> F64:
    """By half of the text, f64 [2, 2]: how many tokens, and the sum of -ln p(token) - ln V over them.

    `states` [B, S, H] are what `head` makes logits of, [n, H] -> f32 [n, V]. Of rows' responses, and of all tokens of
    rows that have none: logits are computed of those alone, `at_once` columns at a time, of which the last bits may
    depend. Raises CheckpointError for states and logits that are not finite.
    """
    require_finite(states.amax(dim=-1).cpu()[batch.mask == 1])  # the largest of each token: NaN is larger than all
    rows, columns = _scored(batch).nonzero(as_tuple=True)  # [n], [n] the token before each
    halves = batch.halves[rows].numpy()  # [n]
    heard = np.zeros((2, 2))
    for start in range(0, len(rows), at_once):
        part = slice(start, start + at_once)
        logits = head(states[rows[part], columns[part]]).cpu()  # [m, V]
        told = batch.ids[rows[part], columns[part] + 1]  # [m]
        losses = torch.nn.functional.cross_entropy(logits, told, reduction="none").double()  # [m]
        require_finite(losses)
        np.add.at(heard[:, 0], halves[part], 1.0)
        np.add.at(heard[:, 1], halves[part], losses.numpy() - math.log(logits.shape[-1]))
    return heard


def _scored(batch: Batch) -> Tensor:
    """Whether the token that follows each is heard, bool [B, S - 1]."""
    scored = batch.mask[:, 1:] == 1  # [B, S - 1]
    answers = scored & (batch.roles[:, 1:] == RESPONSE)
    return answers | (scored & ~answers.any(dim=1, keepdim=True))
