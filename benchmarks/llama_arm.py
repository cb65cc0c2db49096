"""llama.cpp's arm of `bench decode` and `bench prompts`, run by a Python of its own that has llama-cpp-python and none
of this project.

`PYTHON llama_arm.py '{"gguf": ..., "prompt": [...], "tokens": 48, "threads": 1}'`: greedy decoding over mmap'd weights,
one JSON object on the last line, with the fields of the other arms. `"prompts": [[...], ...]` in place of a prompt: the
seconds to the first token of each but the first, which warms up, by length.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")  # only the peer's own Python has it
    task: dict[str, Any] = json.loads(sys.argv[1])
    if "prompts" in task:
        print(json.dumps(_prompts(_open(llama_cpp, task, max(map(len, task["prompts"])) + 8), task["prompts"])))
        return
    started = time.perf_counter()
    llama = _open(llama_cpp, task, len(task["prompt"]) + task["tokens"] + 8)
    opened, before = time.perf_counter(), _read_bytes()
    times, tokens = [], []
    for token in llama.generate(task["prompt"], temp=0.0, repeat_penalty=1.0):
        times.append(time.perf_counter())
        tokens.append(int(token))
        if len(times) == task["tokens"]:
            break
    print(
        json.dumps(
            {
                "open_s": opened - started,
                "ttft_s": times[0] - opened,
                "tok_per_s": (len(times) - 1) / (times[-1] - times[0]),
                "read_bytes": _read_bytes() - before,
                "first_tokens": tokens[:8],
            }
        )
    )


def _open(llama_cpp: Any, task: dict[str, Any], limit: int) -> Any:
    threads = task["threads"]
    return llama_cpp.Llama(
        task["gguf"], n_ctx=limit, n_threads=threads, n_threads_batch=threads, use_mmap=True, verbose=False
    )


def _prompts(llama: Any, prompts: list[list[int]]) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {}
    tokens = []
    for number, prompt in enumerate(prompts):
        llama.reset()
        started = time.perf_counter()
        token = int(next(llama.generate(prompt, temp=0.0, repeat_penalty=1.0)))
        if number:
            seconds.setdefault(len(prompt), []).append(time.perf_counter() - started)
            tokens.append(token)
    return {"seconds": seconds, "first_tokens": tokens}


def _read_bytes() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    main()
