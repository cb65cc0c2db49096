"""Each scorer against the toy layer worked out by hand, and the properties its formula promises."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from profiler.allocation import uniform
from profiler.allocators import ALLOCATORS
from profiler.extras import NOTHING
from profiler.scorers import peu
from profiler.scorers.base import break_ties
from profiler.scorers.mone import output_variance
from profiler.scorers.registry import SCORERS, choose, computable, needs_of, versions
from store.errors import InvalidInput

TOY = {
    "tcess": ([1.25, 0.625, 0, 0], (0, 1)),
    "peu": ([0.75, 0.0944, 0, 0], (0, 1)),
    "reap": ([4.0296, 1.3158, 2.2568, 0.1345], (0, 2)),
    "easy_ep": ([2.4318, 1.9030, 1.4433, 0.0814], (0, 1)),
    "gate": ([1.6119, 1.6678, 0.4514, 0.2689], (0, 1)),
    "frequency": ([0.5, 0.75, 0.5, 0.25], (0, 1)),
    "ean": ([10, 6, 20, 0.5], (0, 2)),
    "man": ([5, 2, 10, 0.5], (0, 2)),
    "msan": ([25, 4.6667, 100, 0.25], (0, 2)),
    "gate_norm": ([8.0592, 3.9474, 4.5136, 0.1345], (0, 2)),
    "act_logits": ([1.25, 0.875, -0.25, 0.5], (0, 1)),
    "mone": ([0, 1.6678, 0.9027, 0], (1, 2)),
    "mone_mean": ([0, 0.5559, 0.4514, 0], (1, 2)),
}
LEARNT = sorted(TOY)
CLUSTERED = ["stun", "uncurl"]


@pytest.mark.parametrize("name", LEARNT)
def test_the_toy_layer_scores_as_worked_out_by_hand(name, toy_statistics):
    expected, kept = TOY[name]
    scores = SCORERS[name].score(toy_statistics)
    np.testing.assert_allclose(scores, [expected], atol=1e-3)
    assert uniform(scores, 0.5, top_k=2).experts == (kept,)


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("name", LEARNT)
def test_the_toy_layer_scores_alike_in_any_batching(name, rows, toy, accumulate):
    scores = SCORERS[name].score(accumulate([toy], rows=rows, padding=2, needs=SCORERS[name].needs))
    np.testing.assert_allclose(scores, [TOY[name][0]], atol=1e-3)


def test_the_toy_layers_threshold(toy_statistics):
    np.testing.assert_allclose(peu.thresholds(toy_statistics), [0.790122], atol=1e-6)


@pytest.mark.parametrize("name", [*LEARNT, *CLUSTERED])
def test_renaming_the_experts_renames_the_scores(name, random_trace, accumulate, summed):
    trace, order = random_trace(1, tokens=300), torch.randperm(8, generator=torch.Generator().manual_seed(2))
    scores = SCORERS[name].score(accumulate([trace], needs=summed))
    renamed = SCORERS[name].score(accumulate([trace.permuted(order)], needs=summed))
    np.testing.assert_allclose(renamed, scores[:, order.numpy()], rtol=1e-9)


@pytest.mark.parametrize("name", [*LEARNT, *CLUSTERED])
def test_text_given_twice_doubles_sums_and_leaves_means(name, random_trace, accumulate, summed):
    trace = random_trace(2)
    statistics = accumulate([trace], needs=summed)
    once = SCORERS[name].score(statistics)
    twice = SCORERS[name].score(accumulate([trace.tokens([*range(40), *range(40)])], needs=summed))
    factor = 2 if name in {"gate", "easy_ep", "ean", "gate_norm", "mone"} else 1
    n = statistics.total("selected")
    bessel = np.sqrt(2 * (n - 1) / (2 * n - 1)) if name in {"mone", "mone_mean"} else 1  # n - 1 does not double
    np.testing.assert_allclose(twice, once * factor * bessel, rtol=1e-9)


def test_louder_experts_score_by_their_loudness_only_where_outputs_count(random_trace, accumulate):
    trace = random_trace(3)
    loud = type(trace)(trace.h, trace.z, trace.weights, trace.index, trace.o.clone())
    loud.o[:, 5] *= 3
    before, after = accumulate([trace]), accumulate([loud])
    factor = np.where(np.arange(8) == 5, 3.0, 1.0)
    for name in ("reap", "ean", "man", "gate_norm"):
        np.testing.assert_allclose(SCORERS[name].score(after), SCORERS[name].score(before) * factor)
    np.testing.assert_allclose(SCORERS["msan"].score(after), SCORERS["msan"].score(before) * factor**2)
    for name in ("gate", "frequency", "tcess", "peu", "act_logits"):
        np.testing.assert_array_equal(SCORERS[name].score(after), SCORERS[name].score(before))
    assert not np.allclose(SCORERS["easy_ep"].score(after), SCORERS["easy_ep"].score(before) * factor)


def test_a_constant_added_to_all_logits_moves_only_the_logit_scores(random_trace, accumulate, summed):
    trace = random_trace(4)
    shifted = type(trace)(trace.h, trace.z + 1.5, trace.weights, trace.index, trace.o)
    before, after = accumulate([trace], needs=summed), accumulate([shifted], needs=summed)
    for name in ("reap", "easy_ep", "frequency", "gate", "mone", "stun", "uncurl"):
        np.testing.assert_allclose(SCORERS[name].score(after), SCORERS[name].score(before))
    np.testing.assert_allclose(peu.thresholds(after), peu.thresholds(before))
    for name in ("tcess", "peu", "act_logits"):
        assert not np.allclose(SCORERS[name].score(after), SCORERS[name].score(before))


def test_an_expert_that_was_never_chosen_scores_nothing(random_trace, accumulate, summed):
    trace = random_trace(5)
    trace.z[:, 6] = -30.0
    weights, index = trace.z.topk(3)
    statistics = accumulate([type(trace)(trace.h, trace.z, weights.softmax(-1), index, trace.o)], needs=summed)
    for name in [*LEARNT, *CLUSTERED]:
        scores = SCORERS[name].score(statistics)
        assert np.isfinite(scores).all()
        assert scores[0, 6] == 0
        assert 6 not in uniform(scores, 0.75, top_k=3).experts[0]


def test_an_output_along_the_residual_is_worth_nothing_to_easy_ep(toy, accumulate):
    along = type(toy)(toy.h, toy.z, toy.weights, toy.index, toy.h[:, None, :].expand(4, 4, 2) * 7)
    np.testing.assert_allclose(SCORERS["easy_ep"].score(accumulate([along])), 0, atol=1e-12)


def exact_utility(trace) -> tuple[np.ndarray, float]:
    """PEU from the whole trace: the threshold first, then every token again."""
    z = trace.z.numpy()
    pools = [np.argsort(-row)[: trace.top_k] for row in z]
    shares = [np.exp(row[pool]) / np.exp(row[pool]).sum() for row, pool in zip(z, pools, strict=True)]
    threshold = float(np.mean([share.max() for share in shares]))
    scores = np.zeros(trace.experts)
    for row, pool, share in zip(z, pools, shares, strict=True):
        for expert, p in zip(pool, share, strict=True):
            if p >= threshold:
                scores[expert] += max(row[expert], 1 / (1 + np.exp(-row[expert])))
    return scores / len(z), threshold


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_histogram_is_exact_within_its_bound(seed, top_k, random_trace, accumulate):
    trace = random_trace(seed, tokens=300, top_k=top_k)
    statistics = accumulate([trace])
    expected, threshold = exact_utility(trace)
    np.testing.assert_allclose(peu.thresholds(statistics), [threshold], rtol=1e-12)
    error, bound = np.abs(peu.utility(statistics)[0] - expected), peu.error_bound(statistics)[0]
    assert (error <= bound + 1e-12).all()
    assert bound.sum() <= 0.05 * expected.sum()  # the one doubtful bin is a small part of the whole


def test_ties_follow_the_gates_and_nothing_else_moves():
    scores = np.array([[0.5, 0.0, 0.0, 0.0], [1e-9, 2e-9, 0.0, 0.0]])
    gates = np.array([[0.0, 1.0, 3.0, 2.0], [9.0, 1.0, 0.0, 5.0]])
    broken = break_ties(scores, gates)
    assert np.argsort(-broken, axis=1, kind="stable").tolist() == [[0, 2, 3, 1], [1, 0, 3, 2]]
    np.testing.assert_allclose(broken, scores, atol=1e-6)


def test_random_is_the_same_every_time_in_any_batching(toy, accumulate):
    wanted = SCORERS["random"].score(accumulate([toy]))
    for rows in (1, 2, 4):
        np.testing.assert_array_equal(SCORERS["random"].score(accumulate([toy], rows=rows, padding=2)), wanted)


def test_random_is_another_of_every_text_and_knows_nothing_of_it(random_trace, accumulate):
    found = [SCORERS["random"].score(accumulate([random_trace(seed)])).ravel() for seed in range(40)]
    between = np.corrcoef(found)[np.triu_indices(40, 1)]
    assert between.max() < 1
    assert abs(between.mean()) < 0.05
    used = [accumulate([random_trace(seed)]).total("selected").ravel() for seed in range(40)]
    assert abs(np.corrcoef(np.ravel(found), np.ravel(used))[0, 1]) < 0.15  # 320 pairs: by chance below 0.11 mostly


def test_the_registry_names_every_scorer_and_its_version():
    assert [scorer.name for scorer in choose()] == ["tcess", "peu", "reap", "easy_ep", "gate", "frequency", "random"]
    assert [scorer.name for scorer in choose(["mone", "reap", "tcess"])] == ["tcess", "reap", "mone"]
    assert all(versions().values())
    assert list(versions()) == list(SCORERS)
    assert needs_of(choose()) == NOTHING
    assert needs_of(choose(["mone", "stun", "reap"])) == {"output_sums", "coactivations"}


def test_a_scorer_of_an_extra_refuses_statistics_without_it(toy, accumulate):
    bare = accumulate([toy])
    for scorer in SCORERS.values():
        if scorer.needs:
            with pytest.raises(InvalidInput, match=f"made without the statistic ({'|'.join(scorer.needs)})"):
                scorer.score(bare)
    assert {scorer.name for scorer in computable(bare)} == {s.name for s in SCORERS.values() if not s.needs}


def test_a_constant_expert_is_worth_nothing_to_mone_whatever_its_loudness(random_trace, accumulate, summed):
    trace = random_trace(6)
    trace.o[:, 3] = torch.tensor([1e4, -2e4, 5e3, 1.0, 0.0], dtype=torch.float64)
    statistics = accumulate([trace], needs=summed)
    variance = output_variance(statistics)[0]
    chosen = [trace.o[(trace.index == e).any(1), e] for e in range(8)]
    expected = [float(o.var(dim=0, correction=1).sum()) for o in chosen]
    np.testing.assert_allclose(variance, np.where(np.arange(8) == 3, 0, expected), rtol=1e-9)
    assert SCORERS["mone"].score(statistics)[0, 3] == SCORERS["mone_mean"].score(statistics)[0, 3] == 0


def test_experts_that_always_run_together_leave_one(accumulate, random_trace, summed):
    """0 and 1 are chosen together by 30 tokens of 40, and 1 gets more weight: 0 is the first to go."""
    trace = random_trace(7, experts=6, top_k=2)
    index = torch.tensor([[0, 1]] * 30 + [[2, 3], [3, 4], [4, 5], [5, 2], [2, 4]] * 2)
    weights = torch.tensor([[0.25, 0.75]] * 40, dtype=torch.float64)
    scores = SCORERS["stun"].score(accumulate([type(trace)(trace.h, trace.z, weights, index, trace.o)], needs=summed))
    assert scores[0].argmin() == 0
    assert scores[0].min() > 0


def test_experts_that_the_router_likes_alike_leave_one(accumulate, random_trace, summed):
    trace = random_trace(8)
    trace.z[:, 5] = trace.z[:, 2] + 1e-6
    weights, index = trace.z.topk(3)
    weights = weights.softmax(-1) * torch.where(index == 2, 2.0, 1.0)
    statistics = accumulate([type(trace)(trace.h, trace.z, weights, index, trace.o)], needs=summed)
    assert SCORERS["uncurl"].score(statistics)[0].argmin() == 5


def test_an_unknown_scorer_is_refused_with_the_names_there_are():
    with pytest.raises(InvalidInput, match=r"no scorer 'best'. Choose from: tcess, peu"):
        choose(["tcess", "best"])


def test_the_pages_have_every_scorer_and_say_how_many_there_are():
    root = Path(__file__).parents[2]
    readme, methods = ((root / name).read_text() for name in ("README.md", "docs/methods.md"))
    table = methods.split("\n## Scorers\n")[1].split("\nNot scorers")[0]
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE)))
    assert sorted(listed) == sorted(SCORERS)
    assert re.findall(r"any of the (\d+) by name|(\d+) scorers, (\d+) allocators", readme) == [
        (str(len(SCORERS)), "", ""),
        ("", str(len(SCORERS)), str(len(ALLOCATORS))),
    ]
