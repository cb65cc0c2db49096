"""Training batches: rows of whole examples of one task, packed so that no example sees another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from demo.corpus import Pair, training_pairs
from demo.recipe import Recipe
from demo.tasks.registry import TASKS


@dataclass
class Batch:
    ids: Tensor  # i64 [B, S]
    positions: Tensor  # i64 [B, S], from 0 in every example
    mask: Tensor  # bool [B, 1, S, S], causal inside an example
    weights: Tensor  # f32 [B, S], of predicting this token; 0 for the first of an example and for padding


def pack(
    tokenizer: PreTrainedTokenizerFast, pairs: Iterator[Pair], recipe: Recipe
) -> tuple[list[int], list[int], list[float]]:
    """One row: whole examples of one task, and which example each token belongs to (0 is padding)."""
    ids: list[int] = []
    example: list[int] = []
    weights: list[float] = []
    number = 1
    while True:
        pair = next(pairs)
        prompt = tokenizer.encode(f"<|user|>{pair.prompt}<|assistant|>", add_special_tokens=False)
        response = tokenizer.encode(pair.response + "<|end|>", add_special_tokens=False)
        if len(ids) + len(prompt) + len(response) > recipe.row_tokens:
            break
        ids += prompt + response
        example += [number] * (len(prompt) + len(response))
        weights += [0.0] + [recipe.prompt_weight] * (len(prompt) - 1) + [1.0] * len(response)
        number += 1
    room = recipe.row_tokens - len(ids)
    return ids + [0] * room, example + [0] * room, weights + [0.0] * room


def batches(tokenizer: PreTrainedTokenizerFast, recipe: Recipe, step: int) -> Iterator[Batch]:
    """Batches from `step` on. Each is seeded by its number, so that a resumed run sees the same text."""
    while True:
        rng = random.Random(f"{recipe.seed}/{step}")
        rows = [pack(tokenizer, training_pairs(TASKS[row % len(TASKS)], rng), recipe) for row in range(recipe.rows)]
        ids, example = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])
        weights = torch.tensor([row[2] for row in rows])
        same = example[:, :, None] == example[:, None, :]
        mask = (same & torch.ones(recipe.row_tokens, recipe.row_tokens, dtype=torch.bool).tril())[:, None]
        starts = F.pad(example[:, 1:] != example[:, :-1], (1, 0), value=True)
        index = torch.arange(recipe.row_tokens).expand_as(ids)
        positions = index - torch.where(starts, index, 0).cummax(dim=1).values
        yield Batch(ids, positions, mask, weights)
        step += 1
