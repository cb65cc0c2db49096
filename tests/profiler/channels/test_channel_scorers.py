"""Every channel scorer against the numbers of its source, and one width for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from profiler.channels.camera import Camera
from profiler.channels.coverage import Coverage
from profiler.channels.heapr import Heapr
from profiler.channels.heapr_joint import HeaprJoint
from profiler.channels.heapr_unit import HeaprUnit
from profiler.channels.random import Random
from profiler.channels.registry import CHANNEL_SCORERS, choose, needs_of
from profiler.channels.router_wanda import RouterWanda
from profiler.channels.widths import covered_by, equal_coverage
from profiler.channels.wifv import Wifv
from profiler.extras import EXTRAS
from profiler.scorers.registry import SCORERS
from profiler.statistics import Statistics
from store.errors import InvalidInput
from store.records import F64


def _one_expert(tokens: int, **extras: Any) -> Statistics:
    """One layer, one expert that got `tokens` tokens; extras [F] (or [2, F] for both of the inputs)."""
    made = {}
    for name, value in extras.items():
        array = np.asarray(value, np.float64)
        array = array[..., None, None, :]  # [L, E, F] at its end
        if EXTRAS[name].halved:
            array = np.stack([array, np.zeros_like(array)])
        made[name] = array
    empty = Statistics.zeros(1, 1, 1)
    empty.selected[0, 0, 0, 0] = tokens
    empty.tokens[0, 0] = 2 * tokens
    return empty.with_extras(made)


def _scores(scorer: Any, tokens: int, **extras: Any) -> list[float]:
    found: F64 = scorer.score(_one_expert(tokens, **extras))
    assert found.shape == (1, 1, found.shape[-1])
    return found[0, 0].tolist()


H = np.array([[1.0, 2.0], [3.0, 0.0]])
WD = np.array([[1.0, 0.0], [0.0, 2.0]])  # a row a channel
G = np.array([[1.0, 0.0], [1.0, 1.0]])


def test_heapr_of_two_tokens() -> None:
    q = G @ WD.T
    extras = {"channel_squares": (H**2).sum(0), "channel_gradients": (q**2).mean(0)}
    assert _scores(Heapr(), 2, **extras) == [5, 4]
    assert _scores(Heapr(by_use=True), 2, **extras) == [2.5, 2]  # half of the text's tokens
    assert _scores(Heapr(), 0, **extras) == [-1, -1]


def test_heapr_joint_and_unit_of_two_tokens() -> None:
    """q is (1, 0) and (1, 2): the products h q are (1, 0) and (3, 0), and |q|^2 is 1 and 5."""
    q, w = G @ WD.T, np.array([[0.5], [1.0]])
    products = ((H * q) ** 2).mean(0)
    assert _scores(HeaprJoint(), 2, channel_products=products) == [5, 0]
    assert _scores(HeaprJoint(), 0, channel_products=[0, 0]) == [-1, -1]
    directions = ((w * H * q) ** 2 / (q**2).sum(1, keepdims=True)).mean(0)
    assert _scores(HeaprUnit(), 2, channel_directions=directions) == pytest.approx([(0.25 + 9 / 5) / 2, 0])
    assert _scores(HeaprUnit(), 0, channel_directions=[0, 0]) == [-1, -1]


def test_heapr_by_gradients_inside_equals_its_form_with_a_matrix() -> None:
    draw = np.random.default_rng(0)
    h, g, down = draw.normal(size=(7, 5)), draw.normal(size=(7, 3)), draw.normal(size=(5, 3))
    matrix = g.T @ g / 7
    wanted = (h**2).mean(0) * np.einsum("ci,ij,cj->c", down, matrix, down)
    extras = {"channel_squares": (h**2).sum(0), "channel_gradients": ((g @ down.T) ** 2).mean(0)}
    np.testing.assert_allclose(_scores(Heapr(), 7, **extras), wanted, rtol=1e-12)


@pytest.mark.parametrize(("share", "wanted"), [(0.0, [3, 4]), (0.9, [1.2, 4]), (1.0, [1, 4])])
def test_camera_weighs_mass_against_peak(share: float, wanted: list[float]) -> None:
    phi = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    extras = {"channel_gated": (phi**2).sum(0), "channel_peaks": phi.max(0), "down_norms": [1, 1]}
    assert _scores(Camera(share), 3, **extras) == pytest.approx(wanted)


def test_heapr_with_a_unit_matrix_and_weights_of_one_is_camera_without_its_peak() -> None:
    draw = np.random.default_rng(1)
    h, down = draw.normal(size=(6, 4)), draw.normal(size=(4, 3))
    norms = np.linalg.norm(down, axis=1)
    squares = (h**2).sum(0)
    extras = {"channel_squares": squares, "channel_gradients": norms**2}
    camera = _scores(Camera(0.0), 6, channel_gated=squares, channel_peaks=np.abs(h).max(0), down_norms=norms)
    np.testing.assert_allclose(_scores(Heapr(), 6, **extras), np.array(camera) / 6, rtol=1e-12)


def test_wifv_is_nothing_for_a_constant_channel() -> None:
    h = np.array([[2.0, 1.0], [2.0, 3.0]])
    extras = {"channel_sums": h.sum(0), "channel_squares": (h**2).sum(0), "down_norms": [5, 2]}
    assert _scores(Wifv(), 2, **extras) == [0, 4]


def test_the_router_turns_wandas_order_around() -> None:
    x, gates = np.array([[0.5, 3.0], [2.0, 0.5]]), np.array([0.1, 0.9])
    wanda = _scores(RouterWanda(), 2, channel_gated=(x**2).sum(0), down_sums=[1, 1])
    assert wanda == pytest.approx([2.06, 3.04], abs=5e-3)
    weighed = _scores(RouterWanda(), 2, channel_gated=((x * gates[:, None]) ** 2).sum(0), down_sums=[1, 1])
    assert weighed == pytest.approx([1.80, 0.54], abs=5e-3)


def test_coverage_is_the_mean_of_three_norms_as_a_share_of_the_layers_mean() -> None:
    found = _scores(Coverage(), 2, channel_squares=[9, 0], channel_inputs=[[36, 0], [0, 81]])
    assert found == [1, 1]  # (3 + 6 + 0) / 3 and (0 + 0 + 9) / 3, both the layer's mean
    assert _scores(Coverage(), 2, channel_squares=[0, 0], channel_inputs=[[0, 0], [0, 0]]) == [0, 0]


def test_random_channels_are_the_same_for_one_text_and_others_for_another() -> None:
    first, again, other = (_scores(Random(), tokens, down_norms=[1] * 9) for tokens in (3, 3, 4))
    assert first == again
    assert sorted(first) != sorted(other)


def test_widths_of_equal_coverage() -> None:
    scores = np.array([[8.0, 1, 1, 0], [4, 3, 2, 1]])
    assert equal_coverage(scores, 4).tolist() == [1, 3]
    covered = covered_by(scores)
    assert [covered[0, 1], covered[1, 3]] == pytest.approx([0.8, 0.9])


def test_widths_spend_every_budget_exactly_and_never_shrink_with_a_larger_one() -> None:
    scores = np.random.default_rng(2).exponential(size=(5, 8)) ** 3
    scores[3] = 0  # an expert that nobody visited counts as flat
    before = np.zeros(5, np.int64)
    for budget in range(5, 41):
        found = equal_coverage(scores, budget, floor=1)
        assert found.sum() == budget
        assert (found >= 1).all()
        assert (found - before).min() >= -1  # a common share moves all of them together, but for the last few
        before = found
    assert before.tolist() == [8] * 5


def test_names_and_needs() -> None:
    assert [scorer.name for scorer in choose(["wifv", "camera"])] == ["camera", "wifv"]
    with pytest.raises(InvalidInput, match="Choose from: camera"):
        choose(["snip"])
    assert needs_of(choose(None)) <= EXTRAS.keys()
    assert len(CHANNEL_SCORERS) == len(choose(None))


def test_an_expert_or_a_strip_of_one_is_worth_what_its_channels_are() -> None:
    extras = {"channel_gated": [4.0, 9.0], "channel_peaks": [1.0, 2.0], "down_norms": [1.0, 0.5]}
    statistics = _one_expert(2, **extras)
    assert SCORERS["camera"].score(statistics) == pytest.approx(Camera().score(statistics).sum(axis=2))
    unit = SCORERS["heapr_unit"]
    assert unit.needs == HeaprUnit.needs
    assert unit.score(_one_expert(0, channel_directions=[1.0, 1.0])).tolist() == [[0.0]]  # -1 each: nothing is known
