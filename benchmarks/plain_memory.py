"""The physical limit of decoding: how fast so many threads read memory, and how many bytes a token needs."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from engine.card import ModelCard
from store.checkpoint import CheckpointMap
from store.experts import ExpertMap

SIZE = 1 << 29  # bytes: no cache holds them
PASSES = 5


def memory_gb_per_s(threads: int, size: int = SIZE) -> float:
    """The fastest of a few passes over `size` bytes, a share for each thread, that do nothing but look for the highest
    number; GB are 1e9 bytes."""
    shares = np.array_split(np.ones(size // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:
        return size / min(_seconds(pool, shares) for _ in range(PASSES)) / 1e9


def _seconds(pool: ThreadPoolExecutor, shares: list[np.ndarray]) -> float:
    started = time.perf_counter()
    list(pool.map(np.max, shares))
    return time.perf_counter() - started


def active_bytes(model: Path) -> int | None:
    """Bytes of weights that one token goes through: all dense ones, but one row of the embedding, and top_k experts of
    each layer. None where arms may compute in another dtype than bfloat16 weights have: what they read is not known."""
    checkpoint = CheckpointMap.open(model)
    experts = ExpertMap.build(checkpoint)
    card = ModelCard.describe(checkpoint, experts)
    if not card.geometry.stored == card.geometry.dtype == "bfloat16":
        return None
    return dense_bytes(checkpoint) + card.top_k * sum(experts.expert_bytes)


def dense_bytes(checkpoint: CheckpointMap) -> int:
    """Bytes, as stored, of the weights that every step reads: all that are no expert's, but an embedding beside a head
    of its own, of which a row is looked up.
    """
    dense = [checkpoint.tensors[name] for name in ExpertMap.build(checkpoint).dense]
    own_head = any(span.name.endswith("lm_head.weight") for span in dense)
    looked_up = sum(span.nbytes for span in dense if own_head and span.name.endswith("embed_tokens.weight"))
    return sum(span.nbytes for span in dense) - looked_up
