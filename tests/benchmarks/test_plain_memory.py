"""What a token needs is counted from the checkpoint, and memory is read by as many threads as asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.plain_memory import active_bytes, memory_gb_per_s
from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap


def test_a_token_needs_all_but_the_embedding_and_the_experts_it_is_not_routed_to(tmp_path: Path) -> None:
    model = write_tiny("olmoe", tmp_path, dtype="bfloat16", num_experts=8, num_experts_per_tok=2)
    checkpoint = CheckpointMap.open(model)
    experts = sum(span.nbytes for name, span in checkpoint.tensors.items() if ".experts." in name)
    embedding = checkpoint.tensors["model.embed_tokens.weight"].nbytes
    assert active_bytes(model) == checkpoint.weight_bytes - embedding - experts + experts * 2 // 8


def test_of_weights_that_arms_may_convert_nothing_is_claimed(tmp_path: Path) -> None:
    assert active_bytes(write_tiny("olmoe", tmp_path)) is None


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_memory_takes_time(threads: int) -> None:
    assert 0 < memory_gb_per_s(threads, 8 << 20) < 10_000
