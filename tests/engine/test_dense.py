"""Dense weights come as experts do: many requests at a time, so that opening is fast and its speed says something."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import reader as reader_module
from engine.engine import Engine
from store.errors import CheckpointError
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


PIECE = "model.layers.0.self_attn.k_conv1d.weight"  # of three that lie in one parameter, one after the other


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_of_a_parameter_come_to_their_rows(dtype: str, checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("kimi_linear")
    engine, stored = open_engine(folder, dtype=dtype), load_file(folder / "model.safetensors")
    wanted = torch.cat([stored[PIECE.replace("k_", f"{which}_")] for which in "qkv"])
    held = dict(engine.passes._model.named_parameters())["model.layers.0.self_attn.conv1d.weight"]
    assert held.equal(wanted.to(held.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(PIECE), r"has shape \[64, 1, 4\], config.json wants \[96, 1, 4\]"),
        (
            lambda held: held.update({PIECE: held[PIECE][:-1].contiguous()}),
            r"\(with .*k_conv1d.* has shape \[95, 1, 4\]",
        ),
        (lambda held: held.update({PIECE: held[PIECE][..., :-1].contiguous()}), r"q_conv1d.weight \(with .*v_conv1d"),
    ],
)
def test_pieces_that_do_not_make_the_parameter_are_refused(
    change: Callable[[dict[str, torch.Tensor]], None], message: str, tmp_path: Path, checkpoint: Checkpoint,
    open_engine: Open,
) -> None:  # fmt: skip
    folder = Path(shutil.copytree(checkpoint("kimi_linear"), tmp_path / "m"))
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        open_engine(folder)
