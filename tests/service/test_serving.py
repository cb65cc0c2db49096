"""The choice of what serves a request. Pure: a catalogue, a plan, a wish; no store, no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime

import numpy as np
import pytest

from engine.plan import MemoryPlan
from service.retrieval import Ranked, Retrieval, decide, pinned
from service.serving import (
    Candidate,
    Catalogue,
    OtherModel,
    Policy,
    ProfiledTask,
    Serving,
    Wish,
    best_by_size,
    choose_candidate,
    choose_serving,
    read_candidates,
)
from store.database import open_store
from store.errors import BudgetError, InvalidInput, MismatchError, MoepagerError, NotFound
from store.fingerprint import Fingerprint
from store.records import GENERALIST, Evaluation, ModelRecord, Profile, Selection, StoredSelection, TaskRecord

LAYERS, EXPERTS, TOP_K = 2, 8, 2


def plan(slots: int) -> MemoryPlan:
    sizes = {field.name: 100 for field in fields(MemoryPlan) if field.name.endswith("_bytes")} | {"slot_bytes": 10}
    shape = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "top_k": TOP_K,
        "least": TOP_K,
        "max_context": 64,
        "max_batch": 2,
        "chunk_tokens": 64,
        "stand_ins": 1,
    }
    return MemoryPlan(budget=10_000, slots=slots, dtype="float32", slots_in="float32", **sizes, **shape)


def candidate(scorer: str, keep: float, accuracy: float | None = 0.9, nll: float = 1.0) -> Candidate:
    selection = Selection.of([range(round(keep * EXPERTS))] * LAYERS)
    stored = StoredSelection(f"{scorer}-{keep}", "p", scorer, "uniform", keep, selection)
    return Candidate(stored, Evaluation(stored.id, "h", 10, accuracy, 1.0, nll, 0.9))


def task(*candidates: Candidate, name: str = "cooking") -> ProfiledTask:
    return ProfiledTask(name, "", f"p-{name}", candidates)


def catalogue(*tasks: ProfiledTask, elsewhere: Mapping[str, OtherModel] | None = None) -> Catalogue:
    return Catalogue("f" * 64, {one.name: one for one in tasks}, elsewhere or {})


ALL = plan(slots=LAYERS * EXPERTS)
NEAR: Retrieval = decide([Ranked("cooking", 0.8)], 0.5)
FAR: Retrieval = decide([Ranked("cooking", 0.3)], 0.5)


def test_the_largest_size_that_fits_serves() -> None:
    sizes = task(*(candidate("reap", keep) for keep in (0.25, 0.5, 1.0)))
    chosen = {
        slots: choose_candidate(sizes, None, None, Policy(plan(slots))).stored.keep for slots in (16, 15, 8, 7, 4)
    }
    assert chosen == {16: 1.0, 15: 0.5, 8: 0.5, 7: 0.25, 4: 0.25}


def test_a_layer_with_fewer_experts_than_a_token_needs_never_serves() -> None:
    with pytest.raises(BudgetError):
        choose_candidate(task(candidate("reap", 0.125)), None, None, Policy(ALL))


def test_at_a_size_the_best_evidence_serves() -> None:
    found = task(
        candidate("tcess", 0.5, 0.8, nll=0.1), candidate("reap", 0.5, 0.9, nll=2), candidate("peu", 0.5, 0.9, nll=3)
    )
    assert choose_candidate(found, None, None, Policy(ALL)).stored.scorer == "reap"


def test_evidence_on_the_newest_text_goes_before_better_figures_of_other_items(tmp_path) -> None:
    made = datetime(2026, 1, 1, tzinfo=UTC)
    profile = Profile("p", "m" * 64, "t", {"x": np.zeros(1)}, 1, "c", frozenset(), {}, made)
    with open_store(f"sqlite:///{tmp_path}/s.db") as store:
        store.models.put(ModelRecord("m" * 64, "m", "f", 1, 4, 2, "c", "w", "t"))
        store.tasks.put(TaskRecord("t"))
        store.profiles.put(profile)
        for name in ("easy", "hard"):
            store.selections.put(StoredSelection(name, "p", name, "uniform", 0.5, Selection(((0, 1),))))
        for name, text, accuracy in (("hard", "old", 0.99), ("easy", "old", 0.95), ("hard", "new", 0.6)):
            store.evaluations.put(Evaluation(name, text, 10, accuracy, 1.0, 1.0, 0.9))
        found = read_candidates(store, profile)
    assert {(c.stored.id, c.evidence.accuracy, c.newest) for c in found} == {("easy", 0.95, False), ("hard", 0.6, True)}
    assert [c.stored.id for c in best_by_size(task(*found), None)] == ["hard"]
    assert [c.stored.id for c in best_by_size(task(*found), "easy")] == ["easy"]  # older evidence serves who asks


def test_without_accuracies_the_lowest_nll_serves_and_any_accuracy_beats_none() -> None:
    found = task(candidate("tcess", 0.5, None, nll=0.5), candidate("reap", 0.5, None, nll=0.4))
    assert choose_candidate(found, None, None, Policy(ALL)).stored.scorer == "reap"
    known = task(*found.candidates, candidate("peu", 0.5, 0.1, nll=9))
    assert choose_candidate(known, None, None, Policy(ALL)).stored.scorer == "peu"


@pytest.mark.parametrize("baseline", ["random", "frequency"])
def test_a_baseline_serves_only_where_it_is_asked_for(baseline: str) -> None:
    found = task(candidate(baseline, 0.5, 1.0), candidate("reap", 0.5, 0.2))
    assert choose_candidate(found, None, None, Policy(ALL)).stored.scorer == "reap"
    assert choose_candidate(found, None, baseline, Policy(ALL)).stored.scorer == baseline
    with pytest.raises(InvalidInput, match="other than the baselines"):
        choose_candidate(task(candidate(baseline, 0.5)), None, None, Policy(ALL))


def test_a_size_that_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(BudgetError, match=r"8 experts.* 4 slots") as caught:
        choose_candidate(task(candidate("reap", 0.5), candidate("reap", 1.0)), None, None, Policy(plan(slots=4)))
    assert caught.value.status == 422


def test_without_evidence_mask_mode_is_refused_even_for_a_named_task() -> None:
    with pytest.raises(InvalidInput, match="no stored evaluation") as caught:
        choose_serving(Wish(task="cooking"), pinned("cooking", 0.5), catalogue(task()), Policy(ALL))
    assert caught.value.code == "no_evidence"


def test_the_settings_size_and_scorer_hold_where_the_request_is_silent() -> None:
    found = task(*(candidate(s, k) for s in ("reap", "tcess") for k in (0.25, 0.5)))
    policy = Policy(ALL, keep=0.25, scorer="tcess")
    assert choose_serving(Wish(), NEAR, catalogue(found), policy).keep == 0.25
    serving = choose_serving(Wish(keep=0.5, scorer="reap"), NEAR, catalogue(found), policy)
    assert (serving.keep, serving.scorer) == (0.5, "reap")


GENERAL = task(candidate("reap", 0.5), name=GENERALIST)
OWN = task(candidate("reap", 0.5))


@pytest.mark.parametrize(
    ("wish", "retrieval", "unknown", "tasks", "wanted"),
    [
        (Wish(), NEAR, "exact", [OWN], ("mask", "cooking")),
        (Wish(mode="mask"), NEAR, "refuse", [OWN], ("mask", "cooking")),
        (Wish(mode="exact"), NEAR, "exact", [OWN], ("exact", None)),
        (Wish(mode="exact"), FAR, "refuse", [OWN], ("exact", None)),
        (Wish(), FAR, "exact", [OWN], ("exact", None)),
        (Wish(), FAR, "exact", [OWN, GENERAL], ("exact", None)),
        (Wish(), FAR, "generalist", [OWN, GENERAL], ("mask", GENERALIST)),
        (Wish(mode="mask"), FAR, "exact", [OWN, GENERAL], ("mask", GENERALIST)),
        (Wish(mode="mask"), FAR, "exact", [OWN], InvalidInput),
        (Wish(), FAR, "refuse", [OWN, GENERAL], InvalidInput),
        (Wish(), FAR, "generalist", [OWN], InvalidInput),
        (Wish(), decide((), 0.5), "refuse", [], InvalidInput),
        (Wish(), decide((), 0.5), "exact", [], ("exact", None)),
        (Wish(keep=0.5), FAR, "exact", [OWN], InvalidInput),
        (Wish(mode="exact", scorer="reap"), NEAR, "exact", [OWN], InvalidInput),
    ],
)
def test_what_serves_each_case(
    wish: Wish,
    retrieval: Retrieval,
    unknown: str,
    tasks: list[ProfiledTask],
    wanted: tuple[str, str | None] | type[MoepagerError],
) -> None:
    def choose() -> Serving:
        return choose_serving(wish, retrieval, catalogue(*tasks), Policy(ALL, unknown_task=unknown))  # type: ignore[arg-type]

    if isinstance(wanted, tuple):
        serving = choose()
        assert (serving.mode, serving.served_task) == wanted
        assert (serving.selection is None) == (serving.mode == "exact")
    else:
        with pytest.raises(wanted):
            choose()


def test_a_refusal_tells_the_nearest_task_and_both_numbers() -> None:
    with pytest.raises(InvalidInput, match=r"'cooking' with similarity 0\.300, the threshold is 0\.500"):
        choose_serving(Wish(), FAR, catalogue(OWN), Policy(ALL, unknown_task="refuse"))


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(NotFound, match="Profiled tasks: cooking"):
        catalogue(OWN).named("knitting")


def test_a_task_of_another_model_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match=r"another model \(olmoe\)"):
        catalogue(OWN, elsewhere={"sql": OtherModel("olmoe")}).named("sql")


def test_a_task_of_the_same_weights_under_another_tokenizer_is_told_as_that() -> None:
    this = Fingerprint(config="c", weights="w", tokenizer="t", whole="f" * 64)

    def other(config: str, weights: str, tokenizer: str) -> OtherModel:
        made = ModelRecord("e" * 64, "olmoe", "olmoe", 2, 4, 2, config, weights, tokenizer)
        return OtherModel.beside(made, this)

    assert str(other("c", "other", "other")) == "olmoe"
    assert str(other("c", "w", "other")) == "olmoe: the same weights with another tokenizer"
    assert str(other("other", "w", "other")) == "olmoe: the same weights with another config and tokenizer"
    found = catalogue(OWN, elsewhere={"sql": other("c", "w", "other"), "law": other("c", "other", "t")})
    with pytest.raises(MismatchError, match=r"another model \(olmoe: the same weights with another tokenizer\)"):
        found.named("sql")
    why = found.why_orphaned()
    assert why is not None
    assert why.startswith("The model's tokenizer changed since sql were profiled")
    assert catalogue(OWN, elsewhere={"law": OtherModel("olmoe")}).why_orphaned() is None


def test_the_generalist_is_no_task_that_a_query_is_matched_to() -> None:
    assert catalogue(OWN, GENERAL).retrievable == ("cooking",)


def test_each_size_shows_its_best_evidence() -> None:
    found = task(
        candidate("reap", 0.25), candidate("reap", 0.5, 0.7), candidate("peu", 0.5, 0.8), candidate("random", 1.0)
    )
    assert [c.stored.id for c in best_by_size(found, None)] == ["peu-0.5", "reap-0.25"]
    assert [c.stored.id for c in best_by_size(found, "random")] == ["random-1.0"]
