"""`moepager profile` as a person or a script calls it."""

from __future__ import annotations

import json
import shlex

import pytest
import typer
from typer.testing import CliRunner

from engine.card import ModelCard
from engine.tiny import write_tiny
from profiler import gather, unfinished
from profiler.commands import app
from store.database import open_store
from store.errors import InvalidInput, MismatchError, MoepagerError, PartsMissing


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny("olmoe", tmp_path_factory.mktemp("tiny"), seed=4)


@pytest.fixture
def write(tmp_path):
    def write_items(name, count, start=0, **extra):
        path = tmp_path / f"{name}.jsonl"
        lines = [json.dumps({"prompt": f"item {start + n}", "response": "yes", **extra}) for n in range(count)]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write_items


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Calls the command on its own home; errors come out as they are, for the root to map."""
    monkeypatch.setenv("MOEPAGER_HOME", str(tmp_path / "home"))
    root = typer.Typer()
    root.callback()(lambda: None)
    root.add_typer(app)

    def call(*options, task="words", code=0):
        common = ["--model", str(model), "--embedder", "hash", "--max-context", "128"]
        result = CliRunner().invoke(root, ["profile", "--task", task, *common, *options])
        if isinstance(result.exception, MoepagerError):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


def test_the_last_line_is_one_json_object_with_the_profile_and_its_evidence(run, write, tmp_path):
    result = run(
        "--calibration", write("c", 6), "--eval", write("e", 3, start=50), "--json",
        "--scorer", "reap", "--scorer", "random", "--keep", "1", "--keep", "0.5", "--description", "yes",
        "--allocator", "uniform",
    )  # fmt: skip
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["tokens"] > 0
    assert found["seconds"] > 0
    assert {"name": "gates", "shape": [2, 2, 3, 8]} in found["statistics"]
    rows = [(row["scorer"], row["keep"], row["experts"]) for row in found["evaluations"]]
    assert rows == [("random", 1.0, 24), ("random", 0.5, 12), ("reap", 1.0, 24), ("reap", 0.5, 12)]
    assert 0 <= found["stability"]["reap"] <= 1
    assert found["evaluations"][1]["accuracy_95"] == pytest.approx([0, 0.5615], abs=1e-4)  # none of three
    assert found["trust"]["tokens_per_expert"] > 0
    assert found["search"] == []
    with open_store(f"sqlite:///{tmp_path}/home/store.db") as store:
        stored = store.profiles.get(found["profile_id"])
        assert stored.task == "words"
        assert stored.trust is not None
        assert (stored.trust.figures, list(stored.doubts)) == (found["trust"], found["doubts"])
        assert store.tasks.get("words").description == "yes"
        assert len(store.exemplars.list(task="words")) == 6


def test_without_json_a_table_shows_every_scorer_and_size(run, write):
    shown = run("--calibration", write("c", 4), "--eval", write("e", 2, start=50), "--scorer", "tcess").stdout
    assert "tcess" in shown
    assert "0.125" in shown
    assert "{" not in shown


def test_no_figure_is_cut_off_where_the_table_goes_into_a_file(run, write):
    shown = run("--calibration", write("c", 4), "--eval", write("e", 3, start=50), "--keep", "0.5").stdout
    assert "\u2026" not in shown
    assert "frequency" in shown


def test_a_search_says_what_it_chose_and_why(run, write):
    result = run(
        "--calibration", write("c", 4), "--eval", write("e", 10, start=50), "--keep", "0.5", "--search", "--json"
    )
    found = json.loads(result.stdout.splitlines()[-1])
    [reason] = found["search"]
    assert reason in " ".join(result.stdout.split())
    assert len({row["allocator"] for row in found["evaluations"]} | {"uniform"}) <= 4
    assert {"random", "frequency"} < {row["scorer"] for row in found["evaluations"]}


def test_a_named_store_and_a_memory_budget_are_used(run, write, tmp_path):
    url = f"sqlite:///{tmp_path}/elsewhere.db"
    run("--calibration", write("c", 4), "--store", url, "--memory", "64MiB", "--keep", "0.5")
    with open_store(url) as store:
        assert [profile.task for profile in store.profiles.list()] == ["words"]


def test_repeated_lines_are_named_and_left_out(run, write, tmp_path):
    path = write("c", 4)
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text((tmp_path / "c.jsonl").read_text() * 2)
    result = run("--calibration", str(doubled), "--keep", "1", "--json")
    assert "line 5 repeats line 1: left out." in result.stderr
    again = run("--calibration", path, "--keep", "1", "--json")
    ids = [json.loads(one.stdout.splitlines()[-1])["profile_id"] for one in (result, again)]
    assert ids[0] == ids[1]


def test_the_generalist_takes_the_tasks_that_are_there(run, write):
    run("--calibration", write("c", 4), "--keep", "0.5")
    result = run("--eval", write("e", 2, start=50), "--keep", "0.5", "--scorer", "gate", "--json", task="generalist")
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["task"], len(found["evaluations"])) == ("generalist", 1)


def test_the_service_s_variables_hold_for_this_command_too(run, write, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEPAGER_STORE", f"sqlite:///{tmp_path}/theirs.db")
    monkeypatch.setenv("MOEPAGER_DTYPE", "int4")
    with pytest.raises(InvalidInput, match="dtype must be one of"):
        run("--calibration", write("c", 2))
    run("--calibration", write("c", 2), "--keep", "0.5", "--scorer", "gate", "--dtype", "float32")
    with open_store(f"sqlite:///{tmp_path}/theirs.db") as store:
        assert [profile.task for profile in store.profiles.list()] == ["words"]
    assert not (tmp_path / "home" / "store.db").exists()


def test_a_task_without_calibration_and_a_generalist_with_one_are_refused(run, write):
    with pytest.raises(InvalidInput, match="A task needs --calibration"):
        run()
    with pytest.raises(InvalidInput, match="--task generalist takes no --calibration"):
        run("--calibration", write("c", 2), task="generalist")


def test_parts_say_which_are_missing_with_the_commands_to_run_and_merge_by_the_same_one(run, write, tmp_path):
    """A command that was told is run as it stands."""
    options = ["--calibration", write("c", 6), "--scorer", "reap", "--scorer", "gate", "--keep", "0.5", "--no-stream"]
    first = run(*options, "--part", "2/3", "--json").stdout.splitlines()
    assert json.loads(first[-1]) == {
        "task": "words", "part": "2/3", "items": 2, "computed": True, "missing": ["1/3", "3/3"]
    }  # fmt: skip
    told = [line.removeprefix("Missing: ") for line in first if line.startswith("Missing: ")]
    assert [("--part 1/3" in line, "--part 3/3" in line) for line in told] == [(True, False), (False, True)]
    with pytest.raises(PartsMissing, match="these are missing: 1/3, 3/3") as refused:
        run(*options)
    assert refused.value.parts == ("1/3", "3/3")
    for line in told:
        words = shlex.split(line)
        assert words[words.index("--scorer") : words.index("--scorer") + 4] == ["--scorer", "reap", "--scorer", "gate"]
        assert "--no-stream" in words
        done = run(*words[words.index("--calibration") :])
    assert "All 3 parts are there. Next: " in done.stdout
    merged = json.loads(run(*options, "--part", "all", "--json").stdout.splitlines()[-1])
    assert (merged["task"], merged["evaluations"]) == ("words", [])
    with open_store(f"sqlite:///{tmp_path}/home/store.db") as store:
        [made] = store.profiles.list()
        assert (made.id, made.tokens) == (merged["profile_id"], merged["tokens"])
        assert {one.scorer for one in store.selections.find(made.id)} == {"reap", "gate"}
    assert "was there" in run(*options, "--part", "2/3").stdout


def test_the_generalist_has_no_parts(run):
    with pytest.raises(InvalidInput, match="it takes no --part"):
        run("--part", "1/2", task="generalist")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "5/4"], "such as 2/4, or all, or none; got '5/4'"),
        (["--part", "all"], "No part of this text of 'words' is in the store"),
        (["--calibration", "absent.jsonl"], "no file absent.jsonl"),
        (["--calibration", "absent.jsonl", "--memory", "2G"], "Not a size of memory"),
        (["--calibration", "absent.jsonl", "--scorer", "best"], "no scorer 'best'"),
        (["--calibration", "absent.jsonl", "--allocator", "best"], "no allocator 'best'"),
        (["--scorer", "router_growth"], "with --base"),
        (["--dtype", "int4"], "dtype must be one of"),
        (["--model", "/nowhere"], "No model folder at /nowhere"),
        (["--eval", "absent.jsonl"], "no file absent.jsonl"),
        (["--eval", "."], r"\. is a folder\. Give a JSONL file"),
        (["--embedder", "/nowhere"], "No sentence-transformers model can be loaded from '/nowhere'"),
    ],
)
def test_what_is_wrong_is_said(options, message, run, write):
    with pytest.raises(MoepagerError, match=message):
        run("--calibration", write("c", 2), *options)


def test_ctrl_c_in_the_pass_says_that_the_same_command_goes_on_and_it_does(run, write, tmp_path, monkeypatch):
    options = ["--calibration", write("c", 6), "--batch", "2", "--keep", "0.5", "--scorer", "gate", "--json"]
    real, shards = gather._statistics, []

    def interrupted(*arguments):
        shards.append(1)
        if len(shards) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(unfinished, "SAVE_AFTER", 0)
    with monkeypatch.context() as patch:
        patch.setattr(gather, "_statistics", interrupted)
        stopped = run(*options, code=130)
    assert "Stopped. What is finished is kept: the same command goes on from there." in stopped.stderr
    with open_store(f"sqlite:///{tmp_path}/home/store.db") as store:
        assert store.profiles.list() == []
    shards.clear()
    monkeypatch.setattr(gather, "_statistics", lambda *arguments: (shards.append(1), real(*arguments))[1])
    assert json.loads(run(*options).stdout.splitlines()[-1])["tokens"] > 0
    assert len(shards) == 1  # the third of three


def test_a_model_other_than_the_one_that_was_meant_is_refused(run, write, model, tmp_path):
    """A service's job opens the folder anew, perhaps after its files changed."""
    text, card = ("--calibration", write("c", 4), "--scorer", "reap", "--keep", "0.5"), ModelCard.read(model)
    for part in ((), ("--part", "1/2")):
        with pytest.raises(MismatchError, match=f"is the model {card.fingerprint[:16]} now, and {'0' * 16} was asked"):
            run(*text, *part, "--fingerprint", "0" * 64)
    with pytest.raises(InvalidInput, match="takes 16 letters or more"):
        run(*text, "--fingerprint", "")
    with open_store(f"sqlite:///{tmp_path}/home/store.db") as store:
        assert store.tasks.list() == []
    for fingerprint in (card.fingerprint, card.fingerprint[:16]):
        run(*text, "--fingerprint", fingerprint)
