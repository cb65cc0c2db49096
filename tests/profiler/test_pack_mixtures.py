"""Recipes that mix experts: what must come out where the answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.channels import Expert
from engine.config import EngineConfig
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler.pack import write_pack
from profiler.pack_clusters import plus_plus, spherical_k_means
from profiler.pack_mixtures import ClusterMeans, Recombined, clusters

H, F = 6, 5


def _expert(seed: int) -> Expert:
    draw = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(F, H, generator=draw, dtype=torch.float64) for _ in range(3))
    return Expert((gate, up), (), down, None)


def _run(expert: Expert, x: Tensor) -> Tensor:
    h = torch.nn.functional.silu(x @ expert.inputs[0].T) * (x @ expert.inputs[1].T)
    return h @ expert.down


X = torch.randn(20, H, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_dropped_neurons_that_double_kept_ones_leave_the_kept_expert_as_it_was() -> None:
    kept, shuffle = _expert(0), torch.tensor([3, 1, 4, 0, 2])
    layer = Recombined(np.array([[2.0, 1.0]]), kept=1, width=F).layer(0, [kept, kept.take(shuffle)])
    torch.testing.assert_close(_run(layer.experts[0], X), _run(kept, X), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer.rows, torch.tensor([[0.5, 0.5]], dtype=torch.float64))


def test_neurons_like_no_kept_one_are_lost_and_the_expert_stays_bit_for_bit() -> None:
    experts = [_expert(seed) for seed in range(3)]
    layer = Recombined(np.array([[1.0, 0.0, 3.0]]), kept=2, width=F).layer(0, experts)
    assert [each.down.data_ptr() for each in layer.experts] == [experts[0].down.data_ptr(), experts[2].down.data_ptr()]
    assert layer.rows.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_neuron_that_is_scaled_one_part_against_another_is_still_the_same_one() -> None:
    kept = _expert(0)
    scaled = Expert((kept.inputs[0], kept.inputs[1] * 3), (), kept.down / 3, None)
    layer = Recombined(np.array([[1.0, 1.0]]), kept=1, width=F).layer(0, [kept, scaled])
    assert layer.rows[0, 1] == 0.5  # all of it was received


def test_a_heavier_source_pulls_a_cluster_further() -> None:
    kept, other = _expert(0), _expert(0)
    near = Expert(other.inputs, (), torch.nn.functional.normalize(other.down + 0.3 * X[:F], dim=1), None)
    moved = []
    for weight in (0.1, 0.9):
        made = Recombined(np.array([[1.0, weight]]), kept=1, width=F).layer(0, [kept, near]).experts[0]
        moved.append(float((torch.nn.functional.normalize(made.down, dim=1) - near.down).norm()))
    assert moved[1] < moved[0]


def test_merging_equal_experts_gives_that_expert_and_others_their_weighted_mean() -> None:
    one, two = _expert(1), _expert(2)
    outputs = torch.stack([_run(one, X), _run(two, X), _run(one, X)], dim=1)  # [m, E, H]
    made = ClusterMeans(lambda _: outputs, np.array([[1.0, 5.0, 3.0]]), kept=2, width=F).layer(0, [one, two, one])
    found = {round(float(row[1])): expert for row, expert in zip(made.rows, made.experts, strict=True)}
    torch.testing.assert_close(_run(found[0], X), _run(one, X), atol=1e-12, rtol=1e-12)
    assert found[1].down.data_ptr() == two.down.data_ptr()
    assert sorted(made.rows.tolist()) == [[0.0, 1.0, 0.0], [0.25, 0.0, 0.75]]
    whole = ClusterMeans(lambda _: outputs, np.array([[1.0, 3.0, 0.0]]), kept=1, width=F).layer(0, [one, two, one])
    wanted = 0.25 * one.down + 0.75 * two.down
    torch.testing.assert_close(whole.experts[0].down, wanted, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_no_cluster_is_empty_even_where_all_outputs_are_the_same(count: int) -> None:
    same = torch.ones(4, 6, H)
    assert sorted(set(clusters(same, count).tolist())) == list(range(count))


def test_spherical_k_means_finds_directions_whatever_the_lengths_were() -> None:
    angles = torch.tensor([0.0, 0.1, 1.5, 1.6, 3.0])
    points = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = spherical_k_means(points, torch.ones(5), plus_plus(points, 3)).tolist()
    assert found[0] == found[1] != found[2] == found[3] != found[4] != found[0]


def _nothing(folder: Path) -> dict[str, Any]:
    return {}


def test_a_mixed_pack_loads_in_plain_transformers_and_gives_what_our_engine_gives(tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "model", seed=2)
    ids = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
    with Engine.open(EngineConfig(folder, max_context=64)) as engine:
        card = engine.card
        x = torch.randn(16, card.hidden, generator=torch.Generator().manual_seed(1))
        counts = np.random.default_rng(0).random((card.layers, card.experts))
        width = engine.layers.channels.width
        recipes = {
            "dern": Recombined(counts, 4, width),
            "sub_moe": ClusterMeans(lambda layer: engine.layers.expert_outputs(layer, x), counts, 4, width),
        }
        for name, recipe in recipes.items():
            write_pack(engine, recipe, tmp_path / name, _nothing)
    for name in recipes:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert plain.config.num_experts == 4
        with torch.inference_mode():
            wanted = plain(input_ids=ids).logits
        with Engine.open(EngineConfig(tmp_path / name, max_context=64)) as engine:
            found = engine.forward(ids, torch.ones_like(ids), [None, None])
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
