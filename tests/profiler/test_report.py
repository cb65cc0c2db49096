"""`moepager report`: one page that stands alone, says what the store says, and trusts no name in it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from engine.card import ModelCard
from engine.tiny import write_tiny
from profiler.commands import app
from profiler.report.gathered import Measured, gather_report
from profiler.report.page import render
from profiler.report.plots import accuracy_curves
from profiler.statistics import Statistics
from store.database import Store, open_store
from store.errors import InvalidInput, MoepagerError, NotFound
from store.intervals import wilson
from store.records import (
    UNJUDGED,
    Evaluation,
    ModelRecord,
    Price,
    Profile,
    Selection,
    StoredSelection,
    TaskRecord,
    Trust,
)

HOSTILE = '<img src=x onerror="alert(1)">&$\\frac{x$'
LAYERS, EXPERTS, TOP_K = 3, 8, 2


class Page(HTMLParser):
    """Text, tags and attributes; every tag that is opened is closed again in order."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.tags, self.values, self.ids = "", set[str](), list[str](), list[str]()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.values += [value for name, value in attrs if value and name in {"href", "src", "xlink:href"}]
        self.ids += [value for name, value in attrs if value and name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def store(tmp_path: Path, folder: Path) -> Store:
    """The tiny model, and nothing else."""
    opened = open_store(f"sqlite:///{tmp_path}/store.db")
    print_ = ModelCard.read(folder).fingerprint
    opened.models.put(ModelRecord(print_, "tiny", "olmoe", LAYERS, EXPERTS, TOP_K, "c", "w", "t"))
    return opened


@pytest.fixture
def fingerprint(folder: Path) -> str:
    return ModelCard.read(folder).fingerprint


@pytest.fixture
def put(store: Store, fingerprint: str) -> Callable[..., Profile]:
    """`put(task, seed, accuracy)`: a profile with selections of two scorers, and evidence unless accuracy is `...`."""

    def make(
        task: str, seed: int = 0, accuracy: float | None = 0.75, *, proven: bool = True, trust: Trust | None = None
    ) -> Profile:
        draw = np.random.default_rng(seed)
        statistics = Statistics.zeros(LAYERS, EXPERTS, TOP_K)
        statistics.tokens[:] = 100
        statistics.selected[:] = draw.integers(1, 50, statistics.selected.shape)
        statistics.gates[:] = statistics.selected * draw.random(statistics.selected.shape)
        store.tasks.put(TaskRecord(task))
        profile = Profile(
            f"p{seed}", fingerprint, task, statistics.arrays, 400, f"calibration{seed}", frozenset({"a", "b"}),
            {"tcess": "1"}, datetime(2026, 1, seed + 1, tzinfo=UTC), trust,
        )  # fmt: skip
        store.profiles.put(profile)
        for scorer in ("tcess", "random") if proven else ():
            for keep in (1.0, 0.5):
                chosen = Selection.of([range(round(keep * EXPERTS))] * LAYERS)
                name = f"{profile.id}-{scorer}-{keep:g}"
                store.selections.put(StoredSelection(name, profile.id, scorer, "uniform", keep, chosen))
                store.evaluations.put(Evaluation(name, f"evaluation{seed}", 20, accuracy, accuracy, 1.25, 0.9))
        return profile

    return make


def test_the_page_stands_alone_and_names_every_task(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    tasks = ["one", "two", "three words"]
    for seed, task in enumerate(tasks):
        put(task, seed)
    text = render(gather_report(store, fingerprint, 0.5), 2**20, store.name)
    page = Page(text)
    assert all(task in page.text for task in tasks)
    assert not {"script", "link", "iframe", "object", "form"} & page.tags
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values)
    assert len(page.ids) == len(set(page.ids))
    assert "url(http" not in text
    assert "@import" not in text
    assert text.count("<svg") == 2 + 2 * len(tasks)
    assert len(re.findall(r'<svg[^>]*role="img" aria-label="[^"]{20,}"', text)) == 2 + 2 * len(tasks)
    for said in ("p1", "calibration1", "evaluation1", "tcess", "75.0%", "53%–89%", fingerprint, "12.00 MiB"):
        assert said in page.text
    assert [round(100 * bound) for bound in wilson(0.75, 20)] == [53, 89]


def test_doubts_and_figures_are_those_that_the_store_has(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    put("doubted", 0, trust=Trust(12.4, 0.125, 8.25, 1.0, 0.5, ("Much too <little> text.",)))
    put("trusted", 1, trust=Trust(50.0, 0.0, 9.0, 3.0, 0.9))
    put("of old", 2)
    text = " ".join(Page(render(gather_report(store, fingerprint, 0.5), 1, store.name)).text.split())
    for said in (
        "Much too <little> text.",
        "12 tokens an expert on the average, 12.5% of the experts never used",
        UNJUDGED,
    ):
        assert said in text
    assert text.count("No reason to doubt this profile was found.") == 1
    assert text.count("times as uneven as chance") == 2


def test_a_hostile_name_stays_text(store: Store, put: Callable[..., Profile], fingerprint: str) -> None:
    put(HOSTILE, 0)
    put("plain", 1)
    text = render(gather_report(store, fingerprint, 0.5), 1, store.name)
    page = Page(text)
    assert HOSTILE in page.text
    assert "img" not in page.tags
    assert "<img" not in text


def test_colours_are_the_pages_where_they_would_be_black(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    put("one", 0)
    text = render(gather_report(store, fingerprint, 0.5), 1, store.name)
    assert "#010203" not in text
    assert text.count("currentColor") > 20
    assert "prefers-color-scheme: dark" in text


def test_numbers_are_those_of_a_plain_count(store: Store, put: Callable[..., Profile], fingerprint: str) -> None:
    profiles = [put("a", 3), put("b", 4)]
    report = gather_report(store, fingerprint, 0.25)
    sets = []
    for one, profile in zip(report.tasks, profiles, strict=True):
        gates = np.asarray(profile.statistics["gates"]).sum(axis=(0, 1))
        np.testing.assert_allclose(one.weight, gates / gates.sum(1, keepdims=True))
        best = [sorted(range(EXPERTS), key=lambda expert, row=row: -row[expert])[:2] for row in gates]
        sets.append({(layer, expert) for layer, ids in enumerate(best) for expert in ids})
        assert set(one.chosen) == sets[-1]
    jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
    np.testing.assert_allclose(report.overlap(), [[1, jaccard], [jaccard, 1]])


def test_the_price_tells_memory_interval_draws_and_other_tasks(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    profile = put("a", 0)
    name = f"{profile.id}-tcess-0.5"
    draws = ((0.7, 1.2), (0.8, 1.3), (0.75, 1.25))
    store.prices.put(Price(name, "own", "evaluation0", 123, 20, 0.75, 0.75, 0.41, 0.92, 1.25, draws))
    store.prices.put(Price(name, "others", "elsewhere", 123, 20, 0.33, 0.75, 0.2, 0.5, 2.0))
    [task] = gather_report(store, fingerprint, 0.25).tasks
    [found] = [one for one in task.measured if one.selection.id == name]
    assert (found.bytes, found.low, found.high, found.elsewhere, found.draws) == (123, 0.41, 0.92, 0.33, 3)
    text = Page(render(gather_report(store, fingerprint, 0.25), 1, store.name)).text
    assert "41%–92%" in text
    assert "33.0%" in text
    assert "123 B" in text


def _measured(scorer: str, keep: float, accuracy: float | None, low: float | None, nll: float = 1.0) -> Measured:
    stored = StoredSelection(f"{scorer}{keep}", "p", scorer, "uniform", keep, Selection.of([[0, 1]]))
    return Measured(stored, Evaluation(stored.id, "e", 20, accuracy, 0.9, nll, 1.0), None, low, None, None, 0)


@pytest.mark.parametrize(
    ("rows", "knee"),
    [
        ([("gate", 1.0, 0.9, 0.7), ("gate", 0.5, 0.75, 0.5), ("gate", 0.25, 0.65, 0.4)], (0.5, 0.25)),
        ([("gate", 1.0, 0.9, 0.7), ("gate", 0.5, 0.6, 0.5), ("peu", 0.5, 0.8, 0.5)], None),  # the best of a size counts
        ([("gate", 1.0, 0.9, 0.7), ("random", 0.5, 0.9, 0.7), ("gate", 0.5, 0.1, 0.0)], (1.0, 0.5)),  # no baseline does
        ([("gate", 1.0, None, None), ("gate", 0.5, None, None)], None),
    ],
)
def test_the_knee_is_where_the_best_of_a_size_first_leaves_the_interval_of_the_largest(
    store: Store,
    put: Callable[..., Profile],
    fingerprint: str,
    rows: list[tuple[str, float, float | None, float | None]],
    knee: tuple[float, float] | None,
) -> None:
    put("cooking")
    report = gather_report(store, fingerprint, 0.5)
    task = replace(report.tasks[0], measured=tuple(_measured(*row) for row in rows))
    assert (task.knee and tuple(one.share for one in task.knee)) == knee
    said = Page(render(replace(report, tasks=(task,)), 2**20, store.name)).text
    sentence = "" if knee is None else f"It breaks between {knee[0]:.1%} and {knee[1]:.1%} of the experts"
    assert sentence in said
    assert ("At none of these sizes" in said) == (knee is None and rows[0][2] is not None)


def test_fewer_calls_are_in_the_table_and_neither_in_the_curves_nor_at_the_knee(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    put("cooking")
    report = gather_report(store, fingerprint, 0.5)
    whole, fewer = _measured("gate", 1.0, 0.9, 0.7), _measured("gate", 0.5, 0.1, 0.0)
    calls = replace(fewer.selection.selection, calls=(1,) * len(fewer.selection.selection.experts))
    fewer = replace(fewer, selection=replace(fewer.selection, selection=calls, active=0.5, calls_by="lexi"))
    task = replace(report.tasks[0], measured=(whole, fewer))
    assert task.knee is None
    said = Page(render(replace(report, tasks=(task,)), 2**20, store.name)).text
    assert "50%, lexi: 1" in said
    assert "It breaks between" not in said
    with_them, without = (accuracy_curves(replace(task, measured=rows), 1) for rows in ((whole, fewer), (whole,)))
    numbered = re.compile(r"\bp\d+-")  # each picture of a page has names of its own
    assert numbered.sub("", with_them) == numbered.sub("", without)


def test_a_task_without_evidence_and_one_that_can_not_be_scored_say_so(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    put("bare", 0, proven=False)
    put("unscored", 1, accuracy=None)
    text = render(gather_report(store, fingerprint, 0.5), 1, store.name)
    assert "There is no evidence" in Page(text).text
    assert "Loss over memory for unscored" in text


def test_a_profile_with_evidence_comes_before_a_younger_one_without(
    store: Store, put: Callable[..., Profile], fingerprint: str
) -> None:
    old = put("a", 1)
    put("a", 2, proven=False)
    assert [one.profile.id for one in gather_report(store, fingerprint, 0.5).tasks] == [old.id]


def test_only_the_tasks_that_were_asked_for(store: Store, put: Callable[..., Profile], fingerprint: str) -> None:
    put("a", 0)
    put("b", 1)
    assert [one.task for one in gather_report(store, fingerprint, 0.5, ["b"]).tasks] == ["b"]
    with pytest.raises(NotFound, match=r"no profile of task 'c'; it has a, b"):
        gather_report(store, fingerprint, 0.5, ["c"])
    with pytest.raises(InvalidInput, match="--keep"):
        gather_report(store, fingerprint, 0.0)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., str]:
    root = typer.Typer()
    root.callback()(lambda: None)
    root.add_typer(app)

    def call(*options: str) -> str:
        url = f"sqlite:///{tmp_path}/store.db"
        result = CliRunner().invoke(root, ["report", "--model", str(folder), "--store", url, *options])
        if isinstance(result.exception, MoepagerError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.output

    return call


def test_the_command_writes_the_page(
    run: Callable[..., str], put: Callable[..., Profile], store: Store, tmp_path: Path
) -> None:
    put("a", 0)
    out = tmp_path / "page.html"
    out.write_text("old")
    assert f"{out}: 1 tasks of tiny" in run("--out", str(out))
    assert "a" in Page(out.read_text()).text
    assert sorted(path.name for path in tmp_path.iterdir() if "page" in path.name) == ["page.html"]
    with pytest.raises(InvalidInput, match="can't be written"):
        run("--out", str(tmp_path / "missing" / "page.html"))


def test_without_profiles_or_matplotlib_the_command_says_what_to_do(
    run: Callable[..., str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match="moepager profile"):
        run()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'moepager\[plots\]'"):
        run()
