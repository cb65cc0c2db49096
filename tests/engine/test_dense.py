"""Dense weights come as experts do: many requests at a time, so that opening is fast and its speed says something."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import reader as reader_module
from engine.engine import Engine
from store.experts import ExpertMap

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many ranges each one had."""
    seen: list[int] = []
    real = reader_module.Reader.start

    def start(self: Any, groups: Sequence[Sequence[Any]], urgent: bool = False) -> Any:
        seen.append(sum(map(len, groups)))
        return real(self, groups, urgent)

    monkeypatch.setattr(reader_module.Reader, "start", start)
    return seen


def test_what_needs_no_conversion_is_one_transfer(
    checkpoint: Checkpoint, open_engine: Open, transfers: list[int]
) -> None:
    engine = open_engine(checkpoint("qwen2_moe"))
    assert transfers == [len(ExpertMap.build(engine.checkpoint).dense)]


def test_what_is_converted_comes_one_after_the_other_and_is_not_read_twice(
    checkpoint: Checkpoint, open_engine: Open, transfers: list[int]
) -> None:
    open_engine(checkpoint("qwen2_moe"))
    straight = sum(transfers)
    transfers.clear()
    open_engine(checkpoint("qwen2_moe"), dtype="bfloat16")
    assert sum(transfers) == straight
    assert max(transfers[:-1]) == 1
