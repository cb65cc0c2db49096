"""`bench mixed` on a tiny model: every arm does the same work and says what it paged."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.mixed import ARMS, bench_mixed
from benchmarks.mixed_tasks import Work, random_tasks
from engine import admission
from engine.card import ModelCard
from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap
from store.errors import InvalidInput


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), num_experts=32)


def test_only_the_arms_that_swap_page_and_the_scheduler_pages_less(model):
    arms, ratios = bench_mixed(model, Work(clients=4, requests=16, prompt_tokens=8, tokens=4), runs=1)
    found = {arm.name: arm for arm in arms}
    assert tuple(found) == ARMS
    assert found["mixed"].experts_paged == found["single"].experts_paged == 0
    assert found["mixed"].bytes_paged == found["single"].bytes_paged == 0
    card = ModelCard.read(model)
    assert found["swap"].bytes_paged == found["swap"].experts_paged * card.expert_bytes
    assert found["mixed"].union == card.layers * (4 + 4 * 4)  # half of the eight that a task keeps is everybody's
    assert 0 < found["scheduled"].experts_paged < found["swap"].experts_paged
    assert all(0 < arm.p50_s <= arm.p99_s and arm.tok_per_s > 0 and arm.ttft_p50_s > 0 for arm in arms)
    assert ratios["mixed_to_swap"] == pytest.approx(found["mixed"].tok_per_s / found["swap"].tok_per_s)
    assert ratios["mixed_to_scheduled"] == pytest.approx(found["mixed"].tok_per_s / found["scheduled"].tok_per_s)


def test_a_decode_step_touches_what_its_rows_were_routed_to(model):
    arms, ratios = bench_mixed(model, Work(clients=4, requests=16, prompt_tokens=8, tokens=4), runs=1)
    found, card = {arm.name: arm for arm in arms}, ModelCard.read(model)
    assert found["swap"].step_rows == 1
    assert found["swap"].step_experts == card.layers * card.top_k
    assert found["single"].step_experts <= card.layers * 8  # a task keeps so many a layer
    assert found["single"].step_experts < found["mixed"].step_experts <= card.layers * 4 * card.top_k
    dense = found["swap"].step_bytes - card.layers * card.top_k * card.expert_bytes
    assert 0 < dense < CheckpointMap.open(model).weight_bytes - card.layers * card.experts * card.expert_bytes
    for arm in arms:
        assert arm.step_bytes == pytest.approx(dense + arm.step_experts * card.expert_bytes)
        assert 0 < arm.decode_s + arm.prompt_s < 16 * 4 / arm.low
    single, mixed = (found[name].step_bytes / found[name].step_rows for name in ("single", "mixed"))
    assert ratios["mixed_to_single_by_bytes"] == pytest.approx(single / mixed)
    assert ratios["swap_reading_to_decoding"] == pytest.approx(found["swap"].read_s / found["swap"].decode_s)


def test_no_arm_has_more_rows_than_asked_for(model):
    arms, _ = bench_mixed(model, Work(clients=4, rows=2, requests=12, prompt_tokens=8, tokens=4), runs=1)
    assert all(arm.step_rows <= 2 for arm in arms)
    assert max(arm.step_rows for arm in arms) > 1


def test_where_rows_are_short_kin_share_steps_and_by_age_they_do_not(model, monkeypatch):
    monkeypatch.setattr(admission, "LAYER_BYTES", 0)  # nor do a tiny model's experts count for little
    # Who arrives beside whom is the threads' affair: of fewer requests the means come within each other's reach.
    work = Work(clients=16, rows=4, requests=64, prompt_tokens=8, tokens=8)
    arms, ratios = bench_mixed(model, work, runs=1)
    found = {arm.name: arm for arm in arms}
    assert tuple(found) == (*ARMS, "by_age")
    assert found["mixed"].step_experts < found["by_age"].step_experts
    assert ratios["mixed_to_by_age"] == pytest.approx(found["mixed"].tok_per_s / found["by_age"].tok_per_s)


def test_a_share_that_is_none_is_refused(model):
    with pytest.raises(InvalidInput, match="--keep must be"):
        bench_mixed(model, Work(keep=1.5), runs=1)


@pytest.mark.parametrize(("overlap", "shared"), [(0.0, 0), (0.25, 2), (1.0, 8)])
def test_random_tasks_share_what_is_said_and_nothing_else(model, overlap, shared):
    tasks = random_tasks(ModelCard.read(model), Work(overlap=overlap))
    for layer in range(ModelCard.read(model).layers):
        kept = [set(task.selection.experts[layer]) for task in tasks]
        assert [len(one) for one in kept] == [8] * 4
        assert {len(one & other) for one in kept for other in kept if one is not other} == {shared}


def test_tasks_that_the_experts_are_too_few_for_are_refused_with_the_numbers(model):
    with pytest.raises(InvalidInput, match=r"4 tasks of 16 experts a layer, 4 of them shared, need 52; there are 32"):
        bench_mixed(model, Work(keep=0.5, overlap=0.25), runs=1)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (Work(overlap=1.5), "--overlap must be a share from 0 to 1, got 1.5"),
        (Work(overlap=0.5, scorer="peu"), "--overlap is of random selections"),
    ],
)
def test_an_overlap_that_means_nothing_is_refused(model, work, message):
    with pytest.raises(InvalidInput, match=message):
        bench_mixed(model, work, runs=1)


def test_the_command_prints_the_arms_and_ratios(model):
    given = [
        "mixed",
        "--model",
        str(model),
        "--requests",
        "8",
        "--clients",
        "2",
        "--tokens",
        "3",
        "--runs",
        "1",
        "--overlap",
        "0.75",
        "--json",
    ]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    answer = json.loads(result.output.strip().splitlines()[-1])
    assert [arm["name"] for arm in answer["arms"]] == list(ARMS)
    assert answer["work"]["overlap"] == 0.75
    assert answer["work"]["rows"] is None
    assert set(answer["ratios"]) == {
        "mixed_to_single",
        "mixed_to_swap",
        "mixed_to_scheduled",
        "scheduled_to_swap",
        "mixed_to_single_by_bytes",
        "mixed_to_single_decoding",
        "swap_reading_to_decoding",
    }
