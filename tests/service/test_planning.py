"""What a plan says before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.plan import plan_memory
from engine.tiny import write_tiny
from engine.tiny_quantised import write_mxfp4
from service.planning import show_memory


@pytest.mark.parametrize(("quantised", "kind"), [(False, "float32"), (True, "MXFP4")])
def test_a_plan_says_what_lies_in_a_slot(quantised: bool, kind: str, tmp_path: Path) -> None:
    folder = write_tiny("mixtral", tmp_path / "m", hidden_size=32, intermediate_size=64)
    card = ModelCard.read(write_mxfp4(folder) if quantised else folder)
    [slots] = [
        line for line in show_memory(card, plan_memory(card, EngineConfig(folder))).splitlines() if "slots" in line
    ]
    assert slots.endswith(f" in {kind}")
