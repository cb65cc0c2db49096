from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pytest

from store.database import Store, open_store
from store.errors import Conflict, CorruptStore, InvalidInput, NotFound
from store.records import UNJUDGED, Evaluation, ModelRecord, Profile, Selection, StoredSelection, TaskRecord, Trust

MakeProfile = Callable[..., Profile]
MakeSelection = Callable[..., StoredSelection]
MakeEvaluation = Callable[..., Evaluation]


def test_a_profile_comes_back_as_it_was(stocked: Store, make_profile: MakeProfile) -> None:
    given = make_profile()
    stocked.profiles.put(given)
    found = stocked.profiles.get("p1")
    assert found == given
    assert found.statistics.keys() == given.statistics.keys()
    for name, array in given.statistics.items():
        assert found.statistics[name].dtype == array.dtype
        assert np.array_equal(found.statistics[name], array)


def test_times_come_back_in_utc_whatever_zone_they_were_given_in(stocked: Store, make_profile: MakeProfile) -> None:
    created = datetime(2025, 7, 1, 8, 0, tzinfo=timezone(timedelta(hours=-7)))
    stocked.profiles.put(make_profile(created=created))
    found = stocked.profiles.get("p1").created
    assert (found, found.utcoffset()) == (created, timedelta(0))


def test_a_time_without_a_zone_is_our_own_bug(stocked: Store, make_profile: MakeProfile) -> None:
    with pytest.raises(Exception, match="needs a zone"):
        stocked.profiles.put(make_profile(created=datetime(2025, 7, 1, 8, 0)))
    assert stocked.profiles.list() == []


def test_a_profile_put_again_stays_as_it_was(stocked: Store, make_profile: MakeProfile) -> None:
    stocked.profiles.put(make_profile())
    later = datetime(2026, 1, 1, tzinfo=UTC)
    stocked.profiles.put(make_profile(created=later))
    assert [profile.created for profile in stocked.profiles.list()] == [make_profile().created]


def test_a_profile_that_nobody_judged_says_so_and_takes_on_the_first_judgement(
    stocked: Store, make_profile: MakeProfile
) -> None:
    stocked.profiles.put(make_profile(trust=None))
    assert stocked.profiles.latest(make_profile().model, "sql") == make_profile(trust=None)
    assert stocked.profiles.get("p1").doubts == (UNJUDGED,)
    stocked.profiles.put(make_profile())
    stocked.profiles.put(make_profile(trust=Trust(99.0, 0.0, 99.0, 99.0, 1.0)))
    [found] = stocked.profiles.list()
    assert (found, found.doubts) == (make_profile(), ("Too little text.", "Too much of one kind."))


@pytest.mark.parametrize("figure", ["tokens_per_expert", "unseen", "skew", "least_skew", "agreement"])
def test_a_judgement_that_is_no_number_leaves_no_profile(
    stocked: Store, make_profile: MakeProfile, figure: str
) -> None:
    broken = replace(make_profile().trust, **{figure: float("nan")})
    with pytest.raises(InvalidInput, match="not finite says nothing"):
        stocked.profiles.put(make_profile(trust=broken))
    assert stocked.profiles.list() == []


def test_a_judgement_goes_with_its_task(stocked: Store, make_profile: MakeProfile) -> None:
    stocked.profiles.put(make_profile())
    stocked.tasks.delete("sql")
    stocked.tasks.put(TaskRecord("sql"))
    stocked.profiles.put(make_profile(trust=None))
    assert stocked.profiles.get("p1").trust is None


def test_an_id_that_stands_for_another_calibration_is_refused(stocked: Store, make_profile: MakeProfile) -> None:
    stocked.profiles.put(make_profile())
    with pytest.raises(Conflict, match="p1 is stored already"):
        stocked.profiles.put(make_profile(calibration_hash="other"))
    assert stocked.profiles.get("p1") == make_profile()


@pytest.mark.parametrize("changes", [{"task": "unknown"}, {"model": "unknown"}])
def test_a_profile_needs_its_model_and_task(stocked: Store, make_profile: MakeProfile, changes: dict[str, str]) -> None:
    with pytest.raises(NotFound, match="unknown"):
        stocked.profiles.put(make_profile(**changes))


def test_an_unknown_profile_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match="No profile p9"):
        store.profiles.get("p9")


def test_the_latest_profile_is_of_this_model_and_task(
    stocked: Store, make_profile: MakeProfile, model: ModelRecord
) -> None:
    stocked.tasks.put(TaskRecord("code"))
    day = timedelta(days=1)
    old, start = make_profile(), make_profile().created
    stocked.profiles.put(make_profile(id="young", created=start + day))
    stocked.profiles.put(old)
    stocked.profiles.put(make_profile(id="other task", task="code", created=start + 2 * day))
    latest = stocked.profiles.latest(model.fingerprint, "sql")
    assert latest is not None
    assert latest.id == "young"
    assert stocked.profiles.latest("another model", "sql") is None
    assert [p.id for p in stocked.profiles.list(model.fingerprint)] == ["other task", "p1", "young"]
    assert stocked.profiles.list("another model") == []


def test_profile_selections_and_evidence_are_put_all_or_nothing(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, make_evaluation: MakeEvaluation
) -> None:
    wrong = make_evaluation(selection="of nothing")
    with pytest.raises(NotFound, match="No selection of nothing"):
        stocked.profiles.put(make_profile(), [make_selection()], [make_evaluation(), wrong])
    assert stocked.profiles.list() == []
    assert stocked.selections.find("p1") == []
    stocked.profiles.put(make_profile(), [make_selection()], [make_evaluation()])
    assert stocked.evaluations.list("p1") == [(make_selection(), make_evaluation())]


def test_damaged_statistics_name_their_profile(
    stocked: Store, make_profile: MakeProfile, run_sql: Callable[[str], None]
) -> None:
    stocked.profiles.put(make_profile())
    run_sql("UPDATE profiles SET statistics = substr(statistics, 1, 100)")
    with pytest.raises(CorruptStore, match=r"statistics of profile p1 are damaged.*profile it again"):
        stocked.profiles.get("p1")


def test_selections_are_found_by_scorer_and_size(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection
) -> None:
    stocked.profiles.put(make_profile())
    for scorer in ("peu", "gate"):
        for keep in (0.125, 1.0, 0.5, 1 / 3):
            stocked.selections.put(make_selection(id=f"{scorer} {keep:.3f}", scorer=scorer, keep=keep))
    found = [selection.id for selection in stocked.selections.find("p1", scorer="peu")]
    assert found == ["peu 1.000", "peu 0.500", "peu 0.333", "peu 0.125"]
    assert [s.id for s in stocked.selections.find("p1", keep=1 / 3)] == ["gate 0.333", "peu 0.333"]
    assert [s.id for s in stocked.selections.find("p1", "gate", 0.5)] == ["gate 0.500"]
    assert len(stocked.selections.find("p1")) == 8
    assert stocked.selections.find("p2") == []


@pytest.mark.parametrize("layers", [[], [[]], [[], [255], []], [range(60)] * 58])
def test_a_selection_of_any_shape_comes_back(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, layers: list[list[int]]
) -> None:
    stocked.profiles.put(make_profile())
    given = make_selection(selection=Selection.of(layers))
    stocked.selections.put(given)
    stocked.selections.put(given)
    assert stocked.selections.get("s1") == given


def test_an_id_that_stands_for_other_experts_is_refused(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection
) -> None:
    stocked.profiles.put(make_profile(), [make_selection()])
    with pytest.raises(Conflict, match="s1 is stored already"):
        stocked.selections.put(make_selection(selection=Selection.of([[0, 1], [1, 2]])))
    assert stocked.selections.get("s1") == make_selection()


def test_a_selection_of_fewer_calls_comes_back_and_its_id_stands_for_them(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection
) -> None:
    fewer = Selection(((0, 1), (1, 2)), calls=(1, 2))
    given = make_selection(selection=fewer, active=0.75, calls_by="lexi")
    stocked.profiles.put(make_profile(), [given])
    assert stocked.selections.get("s1") == given
    with pytest.raises(Conflict, match="s1 is stored already"):
        stocked.selections.put(replace(given, selection=replace(fewer, calls=(2, 1))))
    with pytest.raises(InvalidInput, match="active is a share"):
        stocked.selections.put(replace(given, id="s2", active=1.5))
    assert fewer.digest not in {replace(fewer, calls=calls).digest for calls in (None, (2, 1))}


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.01, float("nan")])
def test_a_selection_keeps_a_share(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, keep: float
) -> None:
    stocked.profiles.put(make_profile())
    with pytest.raises(InvalidInput, match="above 0, up to 1"):
        stocked.selections.put(make_selection(keep=keep))


def test_a_selection_needs_its_profile(stocked: Store, make_selection: MakeSelection) -> None:
    with pytest.raises(NotFound, match="No profile p1"):
        stocked.selections.put(make_selection())
    with pytest.raises(NotFound, match="No selection s1"):
        stocked.selections.get("s1")


def test_the_last_evaluation_counts_and_the_same_items_replace(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, make_evaluation: MakeEvaluation
) -> None:
    stocked.profiles.put(make_profile(), [make_selection()])
    assert stocked.evaluations.find("s1") is None
    first = make_evaluation(accuracy=None, full_accuracy=None)
    second = make_evaluation(evaluation_hash="other items", nll=0.5)
    stocked.evaluations.put(first)
    stocked.evaluations.put(second)
    assert stocked.evaluations.find("s1") == second
    again = make_evaluation(nll=0.75)
    stocked.evaluations.put(again)
    assert [evaluation for _, evaluation in stocked.evaluations.list("p1")] == [again, second]


@pytest.mark.parametrize("changes", [{"nll": float("nan")}, {"nll": float("inf")}, {"coverage": float("nan")}])
def test_numbers_that_are_not_finite_are_no_evidence(
    stocked: Store,
    make_profile: MakeProfile,
    make_selection: MakeSelection,
    make_evaluation: MakeEvaluation,
    changes: dict[str, float],
) -> None:
    stocked.profiles.put(make_profile(), [make_selection()])
    with pytest.raises(InvalidInput, match="no evidence"):
        stocked.evaluations.put(make_evaluation(**changes))


def test_threads_that_put_the_same_profile_leave_one(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, make_evaluation: MakeEvaluation
) -> None:
    def put(_: int) -> None:
        stocked.profiles.put(make_profile(), [make_selection()], [make_evaluation()])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(24)))
    assert stocked.profiles.list() == [make_profile()]
    assert stocked.evaluations.list("p1") == [(make_selection(), make_evaluation())]


def test_threads_that_put_different_profiles_lose_none(stocked: Store, make_profile: MakeProfile) -> None:
    def put_and_read(number: int) -> int:
        stocked.profiles.put(make_profile(id=f"p{number}"))
        return len(stocked.profiles.list())

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(put_and_read, range(24)))
    assert {profile.id for profile in stocked.profiles.list()} == {f"p{n}" for n in range(24)}
    assert all(count >= 1 for count in seen)


DIES = """
    import os, sys
    from datetime import UTC, datetime
    import numpy as np
    import store.profiles
    from store.database import open_store
    from store.records import Profile, Selection, StoredSelection, Trust

    def die(*_):
        os._exit(9)

    url, model = sys.argv[1:]
    store.profiles._put_evaluation = die  # after profile and selection are written, before the commit
    statistics = {"gate": np.ones((64, 64))}
    trust = Trust(1.0, 0.0, 1.0, 1.0, None, ("Killed.",))
    profile = Profile("p1", model, "sql", statistics, 1, "h", frozenset(), {}, datetime.now(UTC), trust)
    selection = StoredSelection("s1", "p1", "gate", "uniform", 0.5, Selection.whole(2, 4))
    open_store(url).profiles.put(profile, [selection], [None])
"""


def test_a_process_killed_in_the_middle_of_a_put_leaves_nothing(
    stocked: Store, database_url: str, model: ModelRecord, make_profile: MakeProfile
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(DIES), database_url, model.fingerprint]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (9, "")
    with open_store(database_url) as again:
        assert again.profiles.list() == []
        assert again.selections.find("p1") == []
        again.profiles.put(make_profile())
        assert stocked.profiles.list() == [make_profile()]


def test_an_evaluation_keeps_the_guards_levels_in_rising_order(
    stocked: Store, make_profile: MakeProfile, make_selection: MakeSelection, make_evaluation: MakeEvaluation
) -> None:
    stocked.profiles.put(make_profile(), [make_selection()], [make_evaluation(levels=(0.9, 0.25, 0.5))])
    [(_, found)] = stocked.evaluations.list("p1")
    assert found.levels == (0.25, 0.5, 0.9)
    with pytest.raises(InvalidInput, match="not finite"):
        stocked.evaluations.put(make_evaluation(levels=(0.5, float("nan"))))
