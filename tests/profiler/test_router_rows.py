"""What is read of routers: from tiny checkpoints of every family, and a fine-tuned one beside its base."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.tiny import FAMILIES, write_tiny
from profiler.router_rows import growth, of_router, router_rows
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, InvalidInput, MismatchError, ShardChanged


def change(folder, edit) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in list(weights):
        if name.split(".")[-2] in {"gate", "router"} and weights[name].dim() == 2:
            weights[name] = edit(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_are_the_checkpoints_own(family, tmp_path):
    folder = write_tiny(family, tmp_path / "m", seed=2)
    rows = router_rows(CheckpointMap.open(folder))
    weights = load_file(folder / "model.safetensors")
    mine = [w for name, w in sorted(weights.items()) if name.split(".")[-2] in {"gate", "router"} and w.dim() == 2]
    np.testing.assert_array_equal(rows, torch.stack(mine).double().numpy())


def test_half_precision_rows_are_read_exactly(tmp_path):
    folder = write_tiny("olmoe", tmp_path / "m", seed=2)
    expected = router_rows(CheckpointMap.open(folder))
    for dtype in (torch.bfloat16, torch.float16):
        change(folder, lambda w, dtype=dtype: w.to(dtype))
        np.testing.assert_allclose(router_rows(CheckpointMap.open(folder)), expected, rtol=1e-2)
    change(folder, lambda w: w.to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3"):
        router_rows(CheckpointMap.open(folder))


def test_rows_of_a_file_that_changed_since_it_was_mapped_are_refused(tmp_path):
    folder = write_tiny("olmoe", tmp_path / "m", seed=2)
    os.utime(folder / "model.safetensors", ns=(0, 5 * 10**9))  # long ago: every write from now on has another time
    checkpoint = CheckpointMap.open(folder)
    change(folder, lambda w: -w)
    with pytest.raises(ShardChanged, match="its time of writing was 1970"):
        router_rows(checkpoint)


def test_growth_is_the_difference_of_norms_and_not_the_norm_of_the_difference():
    base = np.array([[[3.0, 4], [1, 0], [0, 2]]])
    tuned = np.array([[[4.0, 3], [2, 0], [0, 1]]])
    np.testing.assert_allclose(growth(tuned, base), [[0, 1, -1]])


def test_distances_are_those_of_the_rows(tmp_path):
    folder = write_tiny("mixtral", tmp_path / "m", seed=2)
    found = of_router(CheckpointMap.open(folder), frozenset({"router_distances", "output_sums"}), None)
    rows = torch.from_numpy(router_rows(CheckpointMap.open(folder)))
    assert list(found) == ["router_distances"]
    np.testing.assert_allclose(found["router_distances"], torch.cdist(rows, rows).numpy(), atol=1e-6)


def test_growth_without_a_fitting_base_is_refused(tmp_path):
    folder, needs = write_tiny("mixtral", tmp_path / "m", seed=2), frozenset({"router_growth"})
    with pytest.raises(InvalidInput, match="folder with --base"):
        of_router(CheckpointMap.open(folder), needs, None)
    with pytest.raises(MismatchError, match=r"\[3, 4, 32\].*\[3, 8, 32\]"):
        of_router(CheckpointMap.open(folder), needs, write_tiny("mixtral", tmp_path / "small", num_local_experts=4))
    frozen = shutil.copytree(folder, tmp_path / "frozen")
    with pytest.raises(InvalidInput, match="left them frozen"):
        of_router(CheckpointMap.open(folder), needs, frozen)
    change(frozen, lambda w: w * 0.5)
    lengths = np.linalg.norm(router_rows(CheckpointMap.open(folder)), axis=-1)
    np.testing.assert_allclose(
        of_router(CheckpointMap.open(folder), needs, frozen)["router_growth"], lengths / 2, rtol=1e-6
    )
