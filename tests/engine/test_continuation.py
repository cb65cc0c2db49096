"""Whether models go on from the running states they left is tried when they are opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.engine import Engine
from engine.running_state import RunningLayer
from store.errors import UnsupportedFamily

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


@pytest.mark.parametrize(
    ("kind", "goes_on"),
    [("qwen3_next", True), ("granitemoehybrid", True), ("kimi_linear", True), ("lfm2_moe", True), ("jamba", False)],
)
def test_a_family_that_forgets_what_was_before_a_chunk_is_found_out(
    kind: str, goes_on: bool, checkpoint: Checkpoint, open_engine: Open
) -> None:
    assert open_engine(checkpoint(kind)).passes.goes_on is goes_on


@pytest.mark.parametrize(
    ("kind", "goes_on"), [("qwen3_next", True), ("granitemoehybrid", True), ("nemotron_h", True), ("jamba", False)]
)
def test_in_sixteen_bits_rounding_is_not_taken_for_forgetting(
    kind: str, goes_on: bool, checkpoint: Checkpoint, open_engine: Open
) -> None:
    assert open_engine(checkpoint(kind, dtype="bfloat16")).passes.goes_on is goes_on


@pytest.mark.parametrize("forgotten", ["conv", "recurrent"])
def test_a_family_that_forgets_what_was_before_a_token_is_refused(
    forgotten: str, checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = RunningLayer.read

    def forgetful(layer: RunningLayer, kind: str, at: int) -> Tensor:
        found = read(layer, kind, at)  # type: ignore[arg-type]
        return found.copy_(torch.zeros_like(found)) if kind == forgotten else found

    monkeypatch.setattr(RunningLayer, "read", forgetful)
    with pytest.raises(UnsupportedFamily, match="does not go on from the running states"):
        open_engine(checkpoint("qwen3_next"))
