"""Random models at real shapes: they open, they route, and the same seed makes the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.make_model import make_from_config, make_model
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from store.errors import Conflict, InvalidInput


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_tiny("olmoe", tmp_path / "tiny", dtype="bfloat16") / "config.json"


def test_a_model_of_a_config_is_random_and_opens(config: Path, tmp_path: Path) -> None:
    size = make_from_config(config, tmp_path / "a", seed=3)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert size == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        values = tensor.float()
        assert values.isfinite().all()
        assert values.mean() == pytest.approx(1.0 if name.endswith("norm.weight") else 0.0, abs=0.2), name
        assert values.std() > 0.005, name
    with Engine.open(EngineConfig(tmp_path / "a", max_context=32)) as engine:
        ids = torch.tensor([[1, 2, 3]])
        assert engine.forward(ids, torch.ones_like(ids), [None]).isfinite().all()


def test_a_seed_names_the_bytes(config: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_from_config(config, tmp_path / name, seed)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same != other


def test_what_can_not_be_made_is_refused(config: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="olmoe-mini"):
        make_model("giant", tmp_path / "x")
    with pytest.raises(Conflict, match="not empty"):
        make_from_config(config, config.parent)
