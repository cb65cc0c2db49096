"""The budget rule against the operating system: what the process holds, and a kernel that kills what exceeds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

MIB = 2**20
SLACK = 8 * MIB  # Python's own objects: modules, views, the tokenizer
CGROUPS = Path("/sys/fs/cgroup/memory")

SHAPE = {
    "num_hidden_layers": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "hidden_size": 256,
    "intermediate_size": 128,
    "head_dim": 64,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "dtype": "bfloat16",
}

PROGRAM = """
import gc, json, sys, threading
from pathlib import Path
import torch
from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import GenerationRequest, Sampling
from store.records import Selection

folder, warm_up, fields = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def use(engine):
    engine.tokenizer.eos = frozenset()
    keep = min(engine.card.experts, engine.plan.slots_per_layer)
    selection = Selection.of([range(keep)] * engine.card.layers)
    for length in (3, 50, 101):
        mask = GenerationRequest(tuple(range(length)), selection, "mask", Sampling(max_tokens=40))
        list(engine.generate([mask] * 4))
        exact = GenerationRequest(tuple(range(length)), None, "exact", Sampling(max_tokens=10, temperature=1.0))
        list(engine.generate([exact] * 2))

with Engine.open(EngineConfig(warm_up, **fields | {"memory": None})) as engine:
    use(engine)
del engine
gc.collect()
base = peak = held()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())

thread = threading.Thread(target=watch)
thread.start()
try:
    engine = Engine.open(EngineConfig(folder, **fields))
    opened = held()
    use(engine)
finally:
    done.set()
    thread.join()
plan = engine.plan
faulted = plan.dense_bytes + plan.kv_bytes + plan.slots * plan.slot_bytes
seen = {"base": base, "opened": opened - base, "peak": peak - base, "plan": plan.total_bytes, "faulted": faulted}
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def run(checkpoint: Callable[..., Path]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program, in a memory group if one is given."""
    folder, warm_up = checkpoint("olmoe", **SHAPE), checkpoint("olmoe", dtype="bfloat16")

    def call(fields: dict[str, Any], group: Path | None = None) -> subprocess.CompletedProcess[str]:
        def join() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        sizes = json.dumps({"max_context": 256, "max_batch": 4, "chunk_tokens": 128} | fields)
        command = [sys.executable, "-c", PROGRAM, str(folder), str(warm_up), sizes]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, preexec_fn=join, check=False, timeout=240
        )

    return call


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A cgroup v1 memory group of our own, or a skip that says what this machine lacks."""
    group = CGROUPS / f"moepager-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup v1 memory group can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "memory"), [("float32", 70), ("bfloat16", 80)])
def test_the_process_never_holds_more_than_its_budget(
    run: Callable[..., subprocess.CompletedProcess[str]], dtype: str, memory: int
) -> None:
    done = run({"dtype": dtype, "memory": memory * MIB})
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["plan"] <= memory * MIB
    assert seen["opened"] >= 0.95 * seen["faulted"]  # allocated and faulted at open, not on the way
    assert seen["peak"] <= memory * MIB + SLACK


@pytest.mark.slow
def test_under_a_cap_of_the_kernel_the_budgeted_engine_lives_and_the_whole_model_is_killed(
    run: Callable[..., subprocess.CompletedProcess[str]], memory_group: Path
) -> None:
    fields = {"dtype": "float32", "memory": 70 * MIB}
    free = run(fields)
    assert free.returncode == 0, free.stderr[-2000:]
    cap = json.loads(free.stdout.splitlines()[-1])["base"] + 70 * MIB + 2 * SLACK
    (memory_group / "memory.limit_in_bytes").write_text(str(cap))
    capped = run(fields, memory_group)
    assert capped.returncode == 0, (capped.returncode, capped.stderr[-2000:])
    whole = run({"dtype": "float32", "memory": None}, memory_group)
    assert whole.returncode == -9, (whole.returncode, whole.stderr[-2000:])
