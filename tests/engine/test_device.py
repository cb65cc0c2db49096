"""A device is tried before anything is loaded onto it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.device import open_device
from engine.engine import Engine
from store.errors import InvalidInput


def test_the_host_is_always_there() -> None:
    assert open_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["bogus", "meta", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_unknown_or_not_there_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"can't run on device '{name}'.*Give --device cpu") as caught:
        open_device(name)
    assert caught.value.param == "device"


def test_an_engine_refuses_it_before_it_loads(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(InvalidInput, match="can't run on device 'meta'"):
        Engine.open(EngineConfig(checkpoint("qwen2_moe"), device="meta"))
