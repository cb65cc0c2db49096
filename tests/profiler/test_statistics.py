"""The sums are the plain sums, whatever the batching."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from profiler import accumulator
from profiler.accumulator import Accumulator
from profiler.statistics import Statistics, balanced
from store.errors import CheckpointError, CorruptStore


def assert_equal(left: Statistics, right: Statistics, tolerance: float = 1e-12) -> None:
    for name, array in left.arrays.items():
        np.testing.assert_allclose(array, right.arrays[name], rtol=tolerance, atol=tolerance, err_msg=name)


def slow_sums(trace) -> dict[str, np.ndarray]:
    """Every sum by a plain loop over tokens and experts."""
    names = ("selected", "gates", "norms", "squared_norms", "gated_norms", "shifted_norms", "top_logits", "pool_logits")
    sums = {name: np.zeros(trace.experts) for name in names}
    for t in range(len(trace.z)):
        z, o, h = trace.z[t].numpy(), trace.o[t].numpy(), trace.h[t].numpy()
        weights = dict(zip(trace.index[t].tolist(), trace.weights[t].tolist(), strict=True))
        after = h + sum(w * o[e] for e, w in weights.items())
        shift = max(0.0, 1 - h @ after / np.linalg.norm(h) / np.linalg.norm(after))
        sums["top_logits"][z.argmax()] += z.max()
        for e in np.argsort(-z)[: trace.top_k]:
            sums["pool_logits"][e] += z[e]
        for e, w in weights.items():
            norm = np.linalg.norm(o[e])
            parts = (1, w, norm, norm**2, w * norm, shift * w * norm)
            for name, value in zip(names, parts, strict=False):
                sums[name][e] += value
    return sums


@pytest.mark.parametrize("seed", range(3))
def test_the_sums_equal_a_loop_over_tokens(seed, random_trace, accumulate):
    trace = random_trace(seed)
    statistics = accumulate([trace])
    for name, expected in slow_sums(trace).items():
        np.testing.assert_allclose(statistics.total(name)[0], expected, rtol=1e-10, atol=1e-12, err_msg=name)
    chosen = trace.dense_weights > 0
    peaks = torch.where(chosen[:, :, None], trace.o.abs(), 0).amax(dim=(0, 2))
    np.testing.assert_allclose(statistics.peak[0], peaks)
    shares = trace.z.topk(trace.top_k).values.softmax(-1)[:, 0]
    np.testing.assert_allclose(statistics.total("top_shares"), [shares.sum()], rtol=1e-12)
    assert statistics.token_count == len(trace.z)


@pytest.mark.parametrize("at_once", [1, 7 * 8, 1 << 20])
def test_outputs_that_are_widened_piece_by_piece_give_the_same_sums(
    at_once, random_trace, accumulate, summed, monkeypatch
):
    trace = random_trace(11)
    whole = accumulate([trace], rows=3, padding=2, needs=summed)
    monkeypatch.setattr(accumulator, "REDUCED_AT_ONCE", at_once)
    assert_equal(accumulate([trace], rows=3, padding=2, needs=summed), whole)


def test_the_toy_layers_counts_and_sums(toy_statistics):
    np.testing.assert_allclose(toy_statistics.total("selected")[0], [2, 3, 2, 1])
    np.testing.assert_allclose(toy_statistics.total("norms")[0], [10, 6, 20, 0.5])
    np.testing.assert_allclose(toy_statistics.total("squared_norms")[0], [50, 14, 200, 0.25])
    np.testing.assert_allclose(toy_statistics.total("pool_logits")[0] / 4, [1.25, 0.875, -0.25, 0.5])


@pytest.mark.parametrize("seed", range(3))
def test_the_extras_equal_a_loop_over_tokens(seed, random_trace, accumulate, summed):
    trace = random_trace(seed)
    together, products = np.zeros((8, 8)), np.zeros((8, 8))
    outputs = np.zeros((8, trace.h.shape[1]))
    for t in range(len(trace.z)):
        z = trace.z[t].numpy() - trace.z[t].numpy().mean()
        products += np.outer(z, z)
        for one in trace.index[t].tolist():
            outputs[one] += trace.o[t, one].numpy()
            for other in trace.index[t].tolist():
                together[one, other] += 1
    statistics = accumulate([trace], rows=3, padding=1, needs=summed)
    np.testing.assert_allclose(statistics.total("coactivations")[0], together)
    np.testing.assert_allclose(statistics.total("logit_products")[0], products, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(statistics.total("output_sums")[0], outputs, rtol=1e-10, atol=1e-10)


def test_only_the_extras_that_were_asked_for_are_collected(random_trace, accumulate):
    statistics = accumulate([random_trace(0)], needs=frozenset({"coactivations", "router_distances"}))
    assert set(statistics.extras) == {"coactivations"}  # a router's distances are no sum over tokens
    assert accumulate([random_trace(0)]).extras == {}


def test_what_does_not_add_up_stays_what_it_is(random_trace, accumulate, summed):
    distances = {"router_distances": np.arange(64.0).reshape(1, 8, 8)}
    one = accumulate([random_trace(1)], needs=summed).with_extras(distances)
    other = accumulate([random_trace(2)], needs=summed).with_extras(distances)
    for found in (one + other, one.half(0), one.scaled(3), balanced([one, other])):
        np.testing.assert_array_equal(found.total("router_distances"), distances["router_distances"])
    mixed = balanced([one, other.with_extras({"router_growth": np.ones((1, 8))})])
    assert set(mixed.extras) == set(one.extras)
    np.testing.assert_allclose(mixed.total("coactivations")[0].trace(), 3.0)


@pytest.mark.parametrize(("rows", "padding"), [(1, 3), (4, 0), (7, 2), (40, 1)])
def test_any_batching_and_any_padding_give_the_same_sums(rows, padding, random_trace, accumulate, summed):
    traces = [random_trace(5), random_trace(6)]
    together = accumulate(traces, rows=rows, padding=padding, needs=summed)
    assert_equal(together, accumulate(traces, needs=summed))


def test_parts_of_a_text_add_up_to_the_whole(random_trace, accumulate, summed):
    trace = random_trace(7)
    first, second = trace.tokens(range(13)), trace.tokens(range(13, 40))
    parts = accumulate([first], needs=summed) + accumulate([second], half=1, needs=summed)
    assert_equal(parts.half(1), accumulate([second], half=1, needs=summed) + parts.half(0).scaled(0))
    for name in ("coactivations", "output_sums", "gates"):
        np.testing.assert_allclose(parts.total(name), accumulate([trace], needs=summed).total(name), atol=1e-12)
    assert_equal(accumulate([first]) + accumulate([second]), accumulate([trace]))


def test_halves_and_roles_lie_apart_and_add_up(random_trace, accumulate):
    trace = random_trace(8)
    first = accumulate([trace.tokens(range(20))], half=0, role=0)
    second = accumulate([trace.tokens(range(20, 40))], half=1, role=1)
    both = first + second
    assert both.tokens.tolist() == [[20, 0], [0, 20]]
    np.testing.assert_allclose(both.half(0).total("gates"), first.total("gates"))
    np.testing.assert_allclose(both.half(1).total("utility"), second.total("utility"))
    np.testing.assert_allclose(both.total("gated_norms"), accumulate([trace]).total("gated_norms"))


def test_doubled_text_doubles_every_sum_but_no_maximum(random_trace, accumulate):
    trace = random_trace(9)
    once, twice = accumulate([trace]), accumulate([trace.tokens([*range(40), *range(40)])])
    assert_equal(twice, once + once)
    np.testing.assert_array_equal(once.peak, twice.peak)


def test_the_routers_own_weights_and_choice_are_taken(toy, accumulate):
    """A router may choose by a corrected score and weigh by a sigmoid: nothing is derived from the logits."""
    index = torch.tensor([[2, 3], [0, 3], [3, 0], [2, 0]])
    odd = type(toy)(toy.h, toy.z, torch.full((4, 2), 2.5, dtype=torch.float64), index, toy.o)
    statistics = accumulate([odd])
    assert statistics.total("selected")[0].tolist() == [3, 0, 2, 3]
    assert statistics.total("gates")[0].tolist() == [7.5, 0, 5, 7.5]
    np.testing.assert_allclose(statistics.total("top_logits")[0], [5, 2.5, 0, 0])


def test_an_index_of_e_means_no_expert(toy):
    accumulator = Accumulator(1, 4, 2)
    accumulator.begin(torch.zeros(1, 4, dtype=torch.long), torch.tensor([0]))
    accumulator.residual(0, toy.h)
    index = torch.tensor([[0, 4], [0, 4], [1, 4], [4, 4]])
    accumulator.routed(0, toy.h, toy.z, toy.weights, index, torch.ones(4, dtype=torch.bool))
    accumulator.combined(0, torch.zeros_like(toy.h))
    assert accumulator.statistics().total("selected")[0].tolist() == [2, 1, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused_naming_the_layer(bad, random_trace, accumulate):
    good, broken = random_trace(1), random_trace(2)
    broken.o[11, broken.index[11, 0], 2] = bad
    with pytest.raises(CheckpointError, match="expert outputs of MoE layer 1 are not finite"):
        accumulate([good, broken])
    broken.z[3, 2] = bad
    with pytest.raises(CheckpointError, match="router logits of MoE layer 1 are not finite"):
        accumulate([good, broken])


def test_statistics_survive_being_stored_as_arrays(toy_statistics):
    assert_equal(Statistics.from_arrays(toy_statistics.arrays), toy_statistics, tolerance=0)


def test_arrays_of_another_shape_are_refused(toy_statistics):
    arrays = toy_statistics.arrays
    with pytest.raises(CorruptStore, match="gates of shape"):
        Statistics.from_arrays(arrays | {"gates": np.zeros((2, 2, 1, 5))})
    with pytest.raises(CorruptStore, match=r"coactivations of shape \(2, 1, 4, 4\)"):
        Statistics.from_arrays(arrays | {"coactivations": np.zeros((2, 1, 4, 5))})
    with pytest.raises(CorruptStore, match="found nothing"):
        Statistics.from_arrays({name: array for name, array in arrays.items() if name != "norms"})


def test_statistics_of_different_models_do_not_add(toy_statistics):
    with pytest.raises(ValueError, match="top-2"):
        toy_statistics + Statistics.zeros(2, 4, 2)
    with pytest.raises(ValueError, match="Statistics with"):
        toy_statistics + Statistics.zeros(1, 4, 2)


def test_a_balanced_mean_forgets_how_long_a_task_was(random_trace, accumulate):
    one, other = random_trace(3), random_trace(4)
    long = one.tokens([*range(40), *range(40), *range(40)])
    mean = balanced([accumulate([one]), accumulate([other])])
    assert_equal(mean, balanced([accumulate([long]), accumulate([other])]))
    assert mean.token_count == pytest.approx(1.0)
    np.testing.assert_allclose(mean.total("shifted_norms").sum(axis=1), [1.0])
    np.testing.assert_allclose(mean.total("selected").sum(axis=1), [3.0])  # top-3: three choices a token
