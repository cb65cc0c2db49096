"""llama.cpp as an arm: a foreign Python is run with the same prompt, and what it lacks is said."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.decode import LlamaPeer, bench_decode

ANSWER = {"tok_per_s": 5.0, "ttft_s": 0.5, "read_bytes": 7, "peak_anon_bytes": 11}


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
    arms, ratios = bench_decode(tmp_path, [], None, 0.25, 5, 1, 2, LlamaPeer(python, gguf))
    assert [(arm.name, arm.tok_per_s, arm.rounds) for arm in arms] == [("llama.cpp", 5.0, 2)]
    assert ratios == {}
    wish = json.loads(seen.read_text())
    assert (wish["gguf"], wish["tokens"], wish["threads"], len(wish["prompt"])) == (str(gguf), 5, 1, 16)


def test_a_peer_that_does_not_run_has_the_reason_in_place_of_figures(tmp_path: Path) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    python = _python(tmp_path, "echo No module named llama_cpp >&2\nexit 1")
    arms, _ = bench_decode(tmp_path, [], None, 0.25, 5, 1, 2, LlamaPeer(python, gguf))
    assert arms[0].tok_per_s is None
    assert arms[0].failed is not None
    assert "No module named llama_cpp" in arms[0].failed
