"""llama.cpp as an arm: a foreign Python is run with the same prompt, and what it lacks is said."""

from __future__ import annotations

import json
import subprocess
import venv
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode
from benchmarks.decode import Terms, bench_decode
from benchmarks.llama_convert import show
from benchmarks.llama_peer import BINDINGS, LlamaPeer, open_peer
from engine.tiny import write_tiny
from store.errors import MoepagerError

ANSWER = {"tok_per_s": 5.0, "ttft_s": 0.5, "read_bytes": 7}


@pytest.fixture(autouse=True)
def _no_plain_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "memory_gb_per_s", lambda _: 10.0)


def _python(folder: Path, body: str) -> Path:
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return script


def test_the_peer_gets_prompt_tokens_and_threads_and_its_figures_are_its_own(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    seen = tmp_path / "seen"
    python = _python(tmp_path, f"echo \"$2\" > {seen}\necho '{json.dumps(ANSWER)}'")
    model = write_tiny("olmoe", tmp_path / "model")
    arms, ratios = bench_decode(Terms(model, tokens=5, peer=LlamaPeer(python, gguf)), [], 2)
    assert [(arm.name, arm.tok_per_s, arm.rounds) for arm in arms] == [("llama.cpp", 5.0, 2)]
    assert ratios == {}
    wish = json.loads(seen.read_text())
    assert (wish["gguf"], wish["tokens"], wish["threads"], len(wish["prompt"])) == (str(gguf), 5, 1, 16)


def test_a_peer_that_does_not_run_has_the_reason_in_place_of_figures(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    python = _python(tmp_path, "echo No module named llama_cpp >&2\nexit 1")
    arms, _ = bench_decode(Terms(write_tiny("olmoe", tmp_path / "model"), peer=LlamaPeer(python, gguf)), [], 2)
    assert arms[0].tok_per_s is None
    assert arms[0].failed is not None
    assert "No module named llama_cpp" in arms[0].failed


def test_a_checkpoint_is_shown_to_the_converter_with_its_config_written_out(tmp_path: Path) -> None:
    model, shown = write_tiny("olmoe", tmp_path / "model"), tmp_path / "shown"
    shown.mkdir()
    whole = json.loads((model / "config.json").read_text())
    bare = {name: value for name, value in whole.items() if name not in ("architectures", "rms_norm_eps")}
    (model / "config.json").write_text(json.dumps(bare))
    show(model, shown)
    config = json.loads((shown / "config.json").read_text())
    assert config["architectures"] == ["OlmoeForCausalLM"]
    assert config["rms_norm_eps"] > 0
    assert (shown / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert json.loads((model / "config.json").read_text()) == bare


def test_each_part_of_the_peer_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def run(command: list[str | Path], **_: Any) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        made.append(words)
        if words[1].endswith("llama_convert.py"):
            Path(words[3]).write_text("weights")
        if "--target" in words:
            Path(words[words.index("--target") + 1]).mkdir()
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    model = write_tiny("olmoe", tmp_path / "model")
    first = open_peer(tmp_path / "peer", model)
    assert [any(BINDINGS in words for words in made), len(made)] == [True, 3]
    assert first.gguf.read_text() == "weights"
    assert open_peer(tmp_path / "peer", model) == first
    assert len(made) == 3
    assert open_peer(tmp_path / "peer", write_tiny("olmoe", tmp_path / "other", seed=1)).gguf != first.gguf
    assert len(made) == 4  # converted anew, nothing installed


def test_a_step_that_fails_says_what_it_printed_and_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str | Path], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no compiler found")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    for _ in range(2):
        with pytest.raises(MoepagerError, match=r"(?s)llama-cpp-python.*no compiler found"):
            open_peer(tmp_path / "peer", write_tiny("olmoe", tmp_path / "model"))
