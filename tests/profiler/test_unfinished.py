"""Looks that take long go on where they were killed, and end with the same bits: in the loop, and by SIGKILL."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from engine.tiny import write_tiny
from profiler import unfinished
from profiler.batches import encode_corpus
from profiler.corpus import Item, gather
from profiler.job import profile_task
from profiler.options import Options
from profiler.second_looks import second_looks
from profiler.unfinished import NOWHERE, Unfinished
from store.database import open_store
from store.records import TaskRecord

CORPUS = gather([Item(f"number {n} " + "and more " * (n % 4), "yes") for n in range(9)])
LOOKS = [
    "elimination",
    "answer_elimination",
    "subset_losses",
    "dropping",
    "relaxation",
    "channel_gradients",
    "channel_directions",
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = write_tiny("qwen3_moe", tmp_path_factory.mktemp("tiny"), seed=3)
    with Engine.open(EngineConfig(model, max_context=128, max_batch=16)) as opened:
        yield opened


@pytest.fixture(scope="module")
def text(engine):
    return encode_corpus(engine, CORPUS)


class Killed(BaseException):
    pass


class Dying(Unfinished):
    """Dies at the `fatal`-th time that something is saved, after it is on disk."""

    fatal, saves = 0, 0

    def part(self, name: str) -> Unfinished:
        return Dying(self.folder, f"{self.name}.{name}", self._plan)

    def save(self, arrays) -> None:
        super().save(arrays)
        Dying.saves += 1
        if Dying.saves == Dying.fatal:
            raise Killed


@pytest.mark.parametrize("look", LOOKS)
def test_a_look_that_was_killed_goes_on_after_its_last_finished_step(look, engine, text, tmp_path, monkeypatch):
    monkeypatch.setattr(unfinished, "SAVE_AFTER", 0)
    whole = second_looks(engine, text, 4, frozenset({look}), NOWHERE)
    monkeypatch.setattr(Dying, "saves", 0)
    monkeypatch.setattr(Dying, "fatal", 0)
    second_looks(engine, text, 4, frozenset({look}), Dying(tmp_path / "straight", "p", "plan"))
    steps = Dying.saves
    assert steps >= 2
    monkeypatch.setattr(Dying, "saves", 0)
    monkeypatch.setattr(Dying, "fatal", 2)
    with pytest.raises(Killed):
        second_looks(engine, text, 4, frozenset({look}), Dying(tmp_path / "killed", "p", "plan"))
    monkeypatch.setattr(Dying, "saves", 0)
    monkeypatch.setattr(Dying, "fatal", 0)
    again = second_looks(engine, text, 4, frozenset({look}), Dying(tmp_path / "killed", "p", "plan"))
    assert Dying.saves == steps - 2
    for name, array in whole.items():
        assert array.tobytes() == again[name].tobytes(), name


def test_a_look_under_other_conditions_begins_anew(engine, text, tmp_path):
    needs = frozenset({"elimination"})
    second_looks(engine, text, 4, needs, Unfinished(tmp_path, "p", "rows=4"))
    [path] = tmp_path.iterdir()
    with np.load(path) as stored:
        spoilt = {name: stored[name] for name in stored.files} | {"found": stored["found"] + 1}
    np.savez(path, **spoilt)
    spoilt_again = second_looks(engine, text, 4, needs, Unfinished(tmp_path, "p", "rows=4"))["elimination"]
    fresh = second_looks(engine, text, 4, needs, Unfinished(tmp_path, "p", "rows=8"))["elimination"]
    np.testing.assert_allclose(spoilt_again, fresh + 1)  # so the file is what the first of them went by


def test_a_finished_profile_leaves_nothing_unfinished(engine, tmp_path):
    options = Options(scorers=["naee", "tsep"], keeps=(0.5,), rows=4, runs=tmp_path / "runs")
    with open_store(f"sqlite:///{tmp_path}/store.db") as store:
        profile_task(engine, store, TaskRecord("t"), CORPUS, None, embedder=HashEmbedder(), options=options)
    assert [path.suffix for path in (tmp_path / "runs").iterdir()] == [".lock"]


def test_forgetting_one_work_leaves_another_s_of_a_longer_name(tmp_path):
    mine, others = Unfinished(tmp_path, "a", ""), Unfinished(tmp_path, "a-draw1", "")
    for work in (mine, mine.part("look"), others, others.part("look")):
        work.save({"x": np.zeros(1)})
    mine.forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-draw1.look.npz", "a-draw1.npz"]


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from engine.config import EngineConfig
from engine.embedder import HashEmbedder
from engine.engine import Engine
from profiler import unfinished
from profiler.corpus import read_corpus
from profiler.job import profile_task
from profiler.options import Options
from profiler.unfinished import Unfinished
from store.database import open_store
from store.records import TaskRecord

folder, model, url, die_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
unfinished.SAVE_AFTER, saved, save = 0, [], Unfinished.save

def dying(self, arrays):
    save(self, arrays)
    saved.append(self.name.partition(".")[2])
    if f"{saved[-1]} {saved.count(saved[-1])}" == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

Unfinished.save = dying
options = Options(scorers=["naee", "tsep", "diep", "naee_exact"], keeps=(0.5,), rows=4, runs=folder / "runs")
with open_store(url) as store, Engine.open(EngineConfig(model, max_context=128, threads=1)) as engine:
    made = profile_task(engine, store, TaskRecord("t"), read_corpus(folder / "c.jsonl"), None,
        embedder=HashEmbedder(), options=options)
print(json.dumps({"id": made.id, "saved": saved}))
"""


@pytest.mark.slow
def test_a_process_killed_in_one_look_after_the_other_ends_with_the_same_profile(tmp_path):
    model = write_tiny("qwen3_moe", tmp_path / "m", seed=3)
    lines = [json.dumps({"prompt": item.prompt, "response": item.response}) for item in CORPUS.items]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))

    def run(url: str, die_at: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(model), url, die_at]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    straight, killed = f"sqlite:///{tmp_path}/straight.db", f"sqlite:///{tmp_path}/killed.db"
    whole = json.loads(run(straight, "").stdout)
    for die_at in ("elimination 2", "dropping 1", "relaxation 7"):
        assert run(killed, die_at).returncode == -9, die_at
    ended = run(killed, "")
    assert ended.returncode == 0, ended.stderr
    saved = json.loads(ended.stdout)["saved"]
    assert saved.count("relaxation") == whole["saved"].count("relaxation") - 7
    assert "elimination" not in saved
    with open_store(straight) as one, open_store(killed) as other:
        [left], [right] = one.profiles.list(), other.profiles.list()
    assert left.id == right.id == whole["id"]
    for name, array in left.statistics.items():
        assert array.tobytes() == right.statistics[name].tobytes(), name
    assert not list(Path(tmp_path / "runs").glob("*.npz"))
