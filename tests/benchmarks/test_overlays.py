"""Weights replaced in place: merged experts that stand in for others, and a width of its own for every expert."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.overlays import ClusterStandIns, OwnStrips, OwnWidths
from engine.channels import Expert
from store.errors import BudgetError
from store.records import Selection

H, F = 4, 3


def _expert(seed: int) -> Expert:
    draw = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(F, H, generator=draw, dtype=torch.float64) for _ in range(3))
    return Expert((gate, up), (), down, None)


def _outputs(experts: list[Expert]) -> torch.Tensor:
    x = torch.randn(9, H, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    made = [(torch.nn.functional.silu(x @ e.inputs[0].T) * (x @ e.inputs[1].T)) @ e.down for e in experts]
    return torch.stack(made, dim=1)  # [m, E, H]


def test_left_out_copies_of_one_expert_are_replaced_exactly_and_what_is_kept_stays() -> None:
    a, b, c = (_expert(seed) for seed in range(3))
    experts = [a, b, c, b, b]
    recipe = ClusterStandIns(Selection.of([[0, 2]]), 1, lambda _: _outputs(experts), np.ones((1, 5)), F)
    made = recipe.layer(0, experts)
    assert made.rows.tolist() == torch.eye(5).tolist()  # the router asks for whom it likes
    assert (made.experts[0].down is a.down, made.experts[2].down is c.down) == (True, True)
    for each in (1, 3, 4):
        torch.testing.assert_close(made.experts[each].down, b.down, atol=1e-12, rtol=1e-12)


def test_others_get_the_mean_of_their_cluster_by_how_often_they_were_chosen() -> None:
    a, b, c = (_expert(seed) for seed in range(3))
    experts = [a, b, c, b]
    counts = np.array([[9.0, 1.0, 0.0, 3.0]])
    one = ClusterStandIns(Selection.of([[0]]), 1, lambda _: _outputs(experts), counts, F).layer(0, experts)
    torch.testing.assert_close(one.experts[2].down, b.down, atol=1e-9, rtol=1e-9)  # c was never chosen
    two = ClusterStandIns(Selection.of([[0]]), 2, lambda _: _outputs(experts), counts, F).layer(0, experts)
    torch.testing.assert_close(two.experts[2].down, c.down)  # a cluster of its own
    torch.testing.assert_close(two.experts[1].inputs[0], b.inputs[0], atol=1e-12, rtol=1e-12)


def test_own_widths_spend_the_same_channels_over_all_layers_or_in_each() -> None:
    scores = np.array([[[9.0, 8, 7], [6, 1, 1]], [[5.0, 4, 1], [1, 1, 1]]])  # [L 2, E 2, F 3]
    across = OwnWidths(scores, 1 / 3, across=True).chosen()
    assert across.sum(axis=2).tolist() == [[3, 1], [0, 0]]
    assert OwnWidths(scores, 1 / 3, across=False).chosen().sum(axis=2).tolist() == [[2, 0], [2, 0]]
    expert = _expert(0)
    made = OwnWidths(scores, 1 / 3, across=True).layer(0, [expert, expert]).experts
    assert torch.equal(made[0].down, expert.down)
    assert made[1].down.count_nonzero(dim=1).tolist() == [H, 0, 0]


# [L 1, E 3, F 4]: halves, best channels first, are worth 11 and 1; 9 and 4; 1 and 0.
HALVES = np.array([[[1.0, 6, 0, 5], [5, 4, 3, 1], [1, 0, 0, -1]]])


def test_strips_are_given_to_who_has_the_best_channels_left_from_the_front() -> None:
    strips = OwnStrips(HALVES, 0.5, across=True, cut=2, top_k=1)
    assert strips.counts().tolist() == [[1, 2, 0]]
    assert strips.selection == Selection.of([[0, 1]])
    assert strips.chosen().tolist() == [[[False, True, False, True], [True] * 4, [False] * 4]]


def test_a_layer_keeps_a_first_part_of_as_many_experts_as_a_token_goes_through() -> None:
    assert OwnStrips(HALVES, 0.5, across=True, cut=2, top_k=3).counts().tolist() == [[1, 1, 1]]
    poor = np.concatenate([HALVES, HALVES / 1000])
    assert OwnStrips(poor, 0.5, across=True, cut=2, top_k=1).counts().tolist() == [[2, 2, 1], [1, 0, 0]]
    assert OwnStrips(poor, 0.5, across=False, cut=2, top_k=1).counts().tolist() == [[1, 2, 0], [1, 2, 0]]
    with pytest.raises(BudgetError, match="2 strips were asked for; 1 layers need 3"):
        OwnStrips(HALVES, 1 / 3, across=True, cut=2, top_k=3).counts()


def test_all_strips_are_the_expert_itself_and_an_expert_without_one_gives_nothing() -> None:
    expert = _expert(0)
    scores = np.arange(1.0, 7.0).reshape(1, 2, F)
    whole = OwnStrips(scores, 1.0, across=True, cut=3, top_k=1).layer(0, [expert, expert]).experts
    assert all(torch.equal(each.down, expert.down) for each in whole)
    half = OwnStrips(scores, 0.5, across=True, cut=3, top_k=1).layer(0, [expert, expert]).experts
    assert (half[0].down.count_nonzero(), torch.equal(half[1].down, expert.down)) == (0, True)
