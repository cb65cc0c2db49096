"""How likely the model finds the text: what tells that a tokenizer is another model's, or weights are none.

B rows, S length, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from profiler.batches import Batch
from profiler.finite import require_finite
from profiler.statistics import RESPONSE
from store.records import F64


def hear(logits: Tensor, batch: Batch) -> F64:
    """By half of the text, f64 [2, 2]: how many tokens, and the sum of -ln p(token) - ln V over them.

    `logits` [B, S, V]. Of the rows' responses, and of all tokens of rows that have none. Raises CheckpointError for
    logits that are not finite.
    """
    scored = batch.mask[:, 1:] == 1  # [B, S - 1]
    answers = scored & (batch.roles[:, 1:] == RESPONSE)
    scored = answers | (scored & ~answers.any(dim=1, keepdim=True))
    rows = torch.arange(len(scored))[:, None].expand_as(scored)[scored]  # [n]
    guessed = logits[:, :-1].cpu()[scored].float()  # [n, V]
    losses = torch.nn.functional.cross_entropy(guessed, batch.ids[:, 1:][scored], reduction="none").double()  # [n]
    require_finite(losses)
    halves = batch.halves[rows].numpy()  # [n]
    heard = np.zeros((2, 2))
    np.add.at(heard[:, 0], halves, 1.0)
    np.add.at(heard[:, 1], halves, losses.numpy() - math.log(logits.shape[-1]))
    return heard
