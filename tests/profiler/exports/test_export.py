"""Selections in the forms of other engines: each worked out by hand, each read back by that engine's own rules."""

from __future__ import annotations

import io
import json
import random
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from engine.tiny import write_tiny
from profiler.commands import app
from profiler.export import export
from profiler.exports.base import Shape, Subject
from profiler.exports.ktransformers import KTransformers, share
from profiler.exports.plain import Plain
from profiler.exports.registry import FORMS, choose
from profiler.exports.vllm_ascend import VllmAscend, ratio
from profiler.exports.vllm_riy import VllmRiy
from profiler.statistics import Statistics
from store.database import Store, open_store
from store.errors import InvalidInput, MismatchError, MoepagerError, NotFound
from store.records import Evaluation, ModelRecord, Profile, Selection, StoredSelection, TaskRecord

CREATED = datetime(2026, 1, 2, tzinfo=UTC)


def _shape(family: str = "qwen3_moe", layers: tuple[int, ...] = (0, 1), experts: int = 4, **config: Any) -> Shape:
    return Shape(Path("/models/tiny"), family, "f" * 64, layers, layers[-1] + 1, experts, 2, config)


def _subject(experts: list[list[int]], shape: Shape | None = None, stand_in: str = "nothing") -> Subject:
    stored = StoredSelection("s1", "p1", "tcess", "uniform", 0.5, Selection.of(experts), stand_in)
    return Subject(shape or _shape(), "french", stored, None)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_vllm_is_told_the_experts_that_go_by_decoder_layer() -> None:
    dense_first = _shape("deepseek_v3", layers=(1, 2), first_k_dense_replace=1)
    found = json.loads(VllmRiy().write(_subject([[0, 2], [1, 2, 3]], dense_first)))
    assert found == {"version": 1, "model": "tiny", "workload": "french", "pruned_experts": [[1, 1], [1, 3], [2, 0]]}


def test_vllm_ascend_is_told_each_layers_order_and_how_much_of_it_stays() -> None:
    subject = _subject([[1, 3], [0, 2]])
    lines = VllmAscend().write(subject).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"0": [1, 3, 0, 2]}, {"1": [0, 2, 1, 3]}]
    settings = json.loads(shlex.split(VllmAscend().options(subject, Path("x.jsonl")))[-1])
    assert settings == {"expert_list_file": "x.jsonl", "expert_prune_ratio": 0.375}
    assert int(4 * (1.0 - settings["expert_prune_ratio"])) == 2


def test_ktransformers_is_given_counts_of_which_just_the_selections_are_the_largest() -> None:
    subject = _subject([[0, 2], [1, 2, 3]], _shape("deepseek_v3", layers=(1, 2), first_k_dense_replace=1))
    counts = torch.load(io.BytesIO(KTransformers().write(subject)), weights_only=True)["logical_count"]
    assert counts.tolist() == [[[0, 0, 0, 0], [1, 0, 1, 0], [0, 1, 1, 1]]]
    assert int(8 * share(subject)) == 5
    assert "--kt-gpu-experts-ratio 0.6875" in KTransformers().options(subject, Path("x.pt"))


def test_our_own_form_says_whose_selection_it_is_and_what_it_was_worth() -> None:
    evidence = Evaluation("s1", "e" * 64, 20, 0.75, 0.8, 1.25, 0.9, (0.1, 0.2))
    subject = _subject([[0, 2], [1, 2, 3]], _shape(layers=(3, 4)))
    found = json.loads(Plain().write(Subject(subject.shape, "french", subject.stored, evidence)))
    assert found["experts"] == {"3": [0, 2], "4": [1, 2, 3]}
    assert found["model"] == {
        "fingerprint": "f" * 64, "family": "qwen3_moe", "moe_layers": [3, 4], "experts": 4, "top_k": 2,
    }  # fmt: skip
    assert (found["format"], found["version"], found["task"]) == ("moepager-selection", 1, "french")
    assert found["digest"] == subject.stored.selection.digest
    assert found["evidence"] == {
        "evaluation_hash": "e" * 64, "items": 20, "accuracy": 0.75, "full_accuracy": 0.8, "nll": 1.25, "coverage": 0.9,
    }  # fmt: skip


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", list(FORMS))
def test_what_is_read_back_is_what_was_written(name: str, seed: int) -> None:
    rng = random.Random(seed)
    experts, first = rng.choice((4, 7, 60, 128, 256)), 0 if name == "vllm-ascend" else rng.choice((0, 1, 3))
    layers = tuple(range(first, first + rng.randint(1, 5)))
    shape = _shape("qwen3_moe", layers, experts, first_k_dense_replace=first or None)
    same = rng.randint(2, experts)
    sizes = [same if name == "vllm-ascend" else rng.randint(2, experts) for _ in layers]
    subject = _subject([rng.sample(range(experts), size) for size in sizes], shape)
    form = choose(name)
    assert form.read(form.write(subject), subject) == subject.experts


def test_no_size_is_lost_to_the_readers_rounding() -> None:
    for experts in range(2, 130):
        for kept in range(1, experts + 1):
            subject = _subject([list(range(kept))] * 2, _shape(experts=experts))
            assert int(experts * (1.0 - ratio(subject))) == kept
            assert int(2 * experts * share(subject)) == 2 * kept


# --- refusals --------------------------------------------------------------------------------------------------------


def test_vllm_ascend_reads_one_family_and_one_size() -> None:
    with pytest.raises(InvalidInput, match="only qwen3_moe is read, this model is olmoe"):
        VllmAscend().write(_subject([[0, 1], [0, 1]], _shape("olmoe")))
    with pytest.raises(InvalidInput, match=r"every layer must keep the same number, this selection keeps \[2, 3\]"):
        VllmAscend().write(_subject([[0, 1, 2], [0, 1]]))


@pytest.mark.parametrize(
    ("config", "counted"),
    [({"first_k_dense_replace": 1}, [1]), ({"moe_layer_freq": [0, 1]}, [1]), ({"moe_layer_freq": 2}, [0])],
)
def test_where_ktransformers_counts_other_layers_it_is_told_nothing(config: dict[str, Any], counted: list[int]) -> None:
    with pytest.raises(InvalidInput) as error:
        KTransformers().write(_subject([[0, 1], [0, 1]], _shape("qwen3_moe", **config)))
    assert f"it takes the layers {counted} for those with experts, but they are [0, 1]" in str(error.value)


@pytest.mark.parametrize("name", [name for name in FORMS if name != "json"])
def test_stand_ins_are_for_no_other_engine(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="mean outputs"):
        export(_subject([[0, 1], [0, 1]], stand_in="novice"), choose(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(FORMS))
def test_fewer_calls_are_told_by_our_own_form_and_refused_to_every_other(name: str, tmp_path: Path) -> None:
    subject = _subject([[0, 1], [0, 1]])
    fewer = replace(subject.stored, active=0.5, selection=replace(subject.stored.selection, calls=(1, 1)))
    subject = replace(subject, stored=fewer)
    if name == "json":
        export(subject, choose(name), tmp_path / "out")
        assert json.loads((tmp_path / "out").read_text())["calls"] == [1, 1]
        return
    with pytest.raises(InvalidInput, match="would call all"):
        export(subject, choose(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in FORMS if name != "json"])
def test_strips_are_for_no_other_engine(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="has its experts in strips"):
        export(_subject([[0, 1], [0, 1]], _shape(expert_strips=2)), choose(name), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vllm-riy", b'{"version": 2, "pruned_experts": []}', "version 1 was wanted, got 2"),
        ("vllm-riy", b'{"version": 1, "pruned_experts": [[2, 0]]}', r"\(2, 0\) is no expert"),
        ("vllm-riy", b'{"version": 1, "pruned_experts": [[0, 1], [0, 1]]}', "there twice"),
        (
            "vllm-riy",
            b'{"version": 1, "pruned_experts": [[1, 0], [1, 1], [1, 3]]}',
            "layer 1 keeps fewer",
        ),
        ("vllm-ascend", b'{"0": [0, 1, 2, 3]}', r"wanted the layers \[0, 1\], got \[0\]"),
        ("vllm-ascend", b'{"0": [0, 1, 2, 2]}\n{"1": [0, 1, 2, 3]}', "no order of 4 experts"),
        ("json", b'{"format": "other"}', "wanted format 'moepager-selection' version 1, got 'other'"),
    ],
)
def test_what_an_engine_would_refuse_is_refused(name: str, content: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        choose(name).read(content, _subject([[0, 1], [0, 1]]))


def test_our_own_form_is_refused_for_another_model_and_other_layers() -> None:
    subject = _subject([[0, 1], [0, 1]])
    found = json.loads(Plain().write(subject))
    found["model"]["fingerprint"] = "0" * 64
    with pytest.raises(MismatchError, match="made for the model 0000000000000000"):
        Plain().read(json.dumps(found).encode(), subject)
    found["model"]["fingerprint"], found["experts"] = "f" * 64, {"0": [0, 1]}
    with pytest.raises(InvalidInput, match="wanted the layers"):
        Plain().read(json.dumps(found).encode(), subject)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def url(tmp_path: Path, folder: Path) -> str:
    """A store with a task, a half by two scorers, and evidence of one."""
    shape, url = Shape.read(folder), f"sqlite:///{tmp_path}/store.db"
    with open_store(url) as store:
        _fill(store, shape)
    return url


def _fill(store: Store, shape: Shape) -> None:
    layers, experts = len(shape.layers), shape.experts
    model = ModelRecord(shape.fingerprint, "tiny", shape.family, layers, experts, shape.top_k, "c", "w", "t")
    store.models.put(model)
    store.tasks.put(TaskRecord("french"))
    statistics = Statistics.zeros(layers, experts, shape.top_k).arrays
    profile = Profile(
        "p1", shape.fingerprint, "french", statistics, 9, "c1", frozenset({"a"}), {"tcess": "1"}, CREATED
    )  # fmt: skip
    half = Selection.of([range(experts // 2)] * layers)
    chosen = [StoredSelection(f"p1-{scorer}-0.5", "p1", scorer, "uniform", 0.5, half) for scorer in ("tcess", "reap")]
    evidence = Evaluation("p1-tcess-0.5", "e1", 20, 0.75, 0.8, 1.25, 0.9)
    store.profiles.put(profile, chosen, [evidence])


@pytest.fixture
def run(folder: Path, url: str) -> Callable[..., Result]:
    root = typer.Typer()
    root.callback()(lambda: None)
    root.add_typer(app)

    def call(*options: str) -> Result:
        result = CliRunner().invoke(root, ["export", "--model", str(folder), "--store", url, *options])
        if isinstance(result.exception, MoepagerError):
            raise result.exception
        return result

    return call


@pytest.mark.parametrize("form", list(FORMS))
def test_the_command_writes_the_file_and_says_how_to_start_the_other_engine(
    run: Callable[..., Result], tmp_path: Path, folder: Path, form: str
) -> None:
    out = tmp_path / "out.pt"
    result = run("--task", "french", "--scorer", "tcess", "--keep", "0.5", "--form", form, "--out", str(out), "--json")
    found = json.loads(result.stdout.splitlines()[-1])
    shape = Shape.read(folder)
    kept = [list(range(shape.experts // 2))] * len(shape.layers)
    subject = _subject(kept, shape)
    assert (found["selection"], found["experts"]) == ("p1-tcess-0.5", len(subject.stored.selection))
    assert found["accuracy"] == 0.75
    assert form == "json" or str(out) in found["options"]
    assert choose(form).read(out.read_bytes(), subject) == subject.experts
    with pytest.raises(InvalidInput, match="there already"):
        run("--selection", "p1-tcess-0.5", "--out", str(out))


def test_the_command_names_the_selections_that_there_are(run: Callable[..., Result], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    with pytest.raises(InvalidInput, match=r"2 selections of p1 fit.*p1-reap-0\.5, p1-tcess-0\.5"):
        run("--task", "french", *out)
    with pytest.raises(InvalidInput, match=r"0 selections of p1 fit.*p1-reap-0\.5"):
        run("--task", "french", "--keep", "0.1", *out)
    with pytest.raises(NotFound, match="no profile of task 'german'"):
        run("--task", "german", *out)
    with pytest.raises(NotFound):
        run("--selection", "nothing", *out)
    with pytest.raises(InvalidInput, match="no form 'gguf'"):
        run("--task", "french", "--form", "gguf", *out)
    with pytest.raises(InvalidInput, match="Name a task"):
        run(*out)
    with pytest.raises(InvalidInput, match="leave out"):
        run("--selection", "p1-reap-0.5", "--keep", "0.5", *out)
    assert "no evidence" in run("--selection", "p1-reap-0.5", *out).output


def test_a_selection_of_another_model_is_not_exported(run: Callable[..., Result], tmp_path: Path, url: str) -> None:
    other = write_tiny("olmoe", tmp_path / "olmoe")
    with pytest.raises(MismatchError, match="belongs to the model"):
        run("--model", str(other), "--store", url, "--selection", "p1-tcess-0.5", "--out", str(tmp_path / "out"))
