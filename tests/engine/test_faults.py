"""Disks that fail under requests: the request concerned hears of it in words, everybody else goes on, no slot leaks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine import engine as engine_module
from engine import reader as reader_module
from engine.engine import Engine
from engine.requests import FinishedEvent, GenerationRequest
from engine.skeleton import build_skeleton
from engine.worker import EngineWorker
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError, DiskError, PapersChanged, ShardChanged
from store.records import Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]
Ask = Callable[..., GenerationRequest]
Answer = Callable[[Selection | None], str]
OnThread = Callable[[Callable[[Engine], int]], int]

EARLY, LATE = Selection.of([[0, 1, 2, 3]] * 3), Selection.of([[4, 5, 6, 7]] * 3)
PROMPT = tuple(range(5, 25))
WRITTEN = 5 * 10**9  # nanoseconds since 1970


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy that a test may damage, in several shards. It was written long ago, so every write gives another time."""
    made = Path(shutil.copytree(checkpoint("qwen2_moe", max_shard_size="15KB"), tmp_path / "model"))
    for shard in _shards(made):
        os.utime(shard, ns=(0, WRITTEN))
    return made


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, folder: Path, open_engine: Open) -> Engine:
    """Bytes go straight from the file into their slot, or through a host buffer, where they are cast."""
    engine = open_engine(folder, dtype=request.param)
    assert engine.bank.arrivals.direct == (request.param == "float32")
    return engine


@pytest.fixture
def worker(engine: Engine) -> Iterator[EngineWorker]:
    with EngineWorker(engine) as worker:
        yield worker


@pytest.fixture
def answer(worker: EngineWorker, ask: Ask) -> Answer:
    def call(selection: Selection | None) -> str:
        events = list(worker.submit(ask(PROMPT, selection, max_tokens=4, ignore_eos=True)))
        assert isinstance(events[-1], FinishedEvent)
        return events[-1].text

    return call


@pytest.fixture
def on_thread(worker: EngineWorker) -> OnThread:
    """Do something between two batches: a lease outlives its answer's last event by a moment."""
    return lambda function: worker.run(function).result()


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _overwrite(shard: Path) -> None:
    """Other weights of the same shapes, in place."""
    size = int.from_bytes(shard.read_bytes()[:8], "little") + 8
    with shard.open("r+b") as file:
        file.seek(size)
        file.write(bytes(shard.stat().st_size - size))


def _at_rest(engine: Engine) -> None:
    """Until no thread of the reader is at a read, and so at its fault."""
    while engine._reader.meter._working:
        time.sleep(0.001)


def _leased(engine: Engine) -> int:
    return engine.residency().leased


def _from(number: int, fault: Callable[[], object]) -> Callable[..., int]:
    """A preadv that has the fault before the read of that number, and before every later one."""
    real, count, lock = os.preadv, iter(range(10**9)), threading.Lock()

    def read(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        with lock:
            if next(count) >= number:
                fault()
        return real(descriptor, buffers, offset)

    return read


def _fails(number: int) -> Callable[..., int]:
    def broken() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    return _from(number, broken)


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("selection", [LATE, None])
def test_an_input_output_error_in_mid_swap_reaches_its_request_and_the_next_one_is_right(
    on_thread: OnThread,
    answer: Answer,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    selection: Selection | None,
) -> None:
    right = {one: answer(one) for one in (EARLY, selection)}
    on_thread(Engine.evict)
    answer(EARLY)
    monkeypatch.setattr(reader_module.os, "preadv", _fails(number))
    with pytest.raises(CheckpointError, match="Input/output error"):
        answer(selection)
    assert answer(EARLY) == right[EARLY]  # resident: needs no disk
    monkeypatch.undo()
    assert on_thread(_leased) == 0
    assert answer(selection) == right[selection]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("selection", [LATE, None])
def test_a_shard_that_shrinks_in_mid_swap_is_named_resident_tasks_go_on_and_once_it_is_as_it_was_all_do(
    engine: Engine, on_thread: OnThread, folder: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch, number: int,
    selection: Selection | None,
) -> None:  # fmt: skip
    right = {one: answer(one) for one in (EARLY, selection)}
    on_thread(Engine.evict)
    answer(EARLY)
    shards = {shard: shard.read_bytes() for shard in _shards(folder)}
    monkeypatch.setattr(
        reader_module.os, "preadv", _from(number, lambda: [os.truncate(shard, 600) for shard in shards])
    )
    with pytest.raises(ShardChanged, match=r"its size was [\d,]+ bytes and is 600 bytes"):
        answer(selection)
    monkeypatch.undo()
    assert answer(EARLY) == right[EARLY]
    assert on_thread(_leased) == 0
    _at_rest(engine)  # or shards are truncated once more
    for shard, content in shards.items():
        with shard.open("r+b") as file:
            file.write(content)
    with pytest.raises(ShardChanged, match="its time of writing was 1970"):  # whole, but who knows of what
        answer(selection)
    for shard in shards:
        os.utime(shard, ns=(0, WRITTEN))  # as a restore from a copy leaves it
    assert answer(selection) == right[selection]


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("selection", [LATE, None])
def test_a_shard_that_is_overwritten_at_equal_size_in_mid_swap_is_served_no_more_until_the_model_is_opened_anew(
    engine: Engine, on_thread: OnThread, folder: Path, answer: Answer, ask: Ask, open_engine: Open,
    monkeypatch: pytest.MonkeyPatch, number: int, selection: Selection | None,
) -> None:  # fmt: skip
    right = {one: answer(one) for one in (EARLY, selection)}
    on_thread(Engine.evict)
    answer(EARLY)
    overwritten = _from(number, lambda: [_overwrite(shard) for shard in _shards(folder)])
    monkeypatch.setattr(reader_module.os, "preadv", overwritten)
    with pytest.raises(ShardChanged, match=r"safetensors is not the file any more .*Open the model again"):
        answer(selection)
    monkeypatch.undo()
    with pytest.raises(ShardChanged):
        answer(selection)
    assert answer(EARLY) == right[EARLY]  # of the old bytes, every one
    assert on_thread(_leased) == 0
    _at_rest(engine)  # or shards are overwritten once more
    fresh = open_engine(folder, dtype=engine.plan.dtype)
    *_, end = fresh.generate([ask(PROMPT, selection, max_tokens=4, ignore_eos=True)])
    assert isinstance(end, FinishedEvent)
    assert end.text != right[selection]


def test_shards_that_are_swapped_between_their_headers_and_their_opening_are_not_opened(
    folder: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(*args: Any) -> Any:
        for shard in _shards(folder):
            beside = Path(shutil.copy2(shard, folder / "beside"))
            _overwrite(beside)
            beside.rename(shard)
        return build_skeleton(*args)

    monkeypatch.setattr(engine_module, "build_skeleton", swap)
    with pytest.raises(ShardChanged, match="its inode was"):
        open_engine(folder)


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_is_overwritten_while_dense_weights_load_is_no_model(
    folder: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    overwritten = _from(number, lambda: [_overwrite(shard) for shard in _shards(folder)])
    monkeypatch.setattr(reader_module.os, "preadv", overwritten)
    with pytest.raises(ShardChanged):
        open_engine(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_config_or_tokenizer_that_is_changed_while_the_model_is_opened_is_no_model(
    folder: Path, open_engine: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def change(*args: Any) -> Any:
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | {"eos_token_id": 1}))
        return build_skeleton(*args)

    monkeypatch.setattr(engine_module, "build_skeleton", change)
    with pytest.raises(PapersChanged, match=rf"{name} in .* changed after"):
        open_engine(folder)
    monkeypatch.undo()
    open_engine(folder)


def test_a_model_whose_shards_change_before_its_fingerprint_is_taken_has_none(folder: Path) -> None:
    checkpoint = CheckpointMap.open(folder)
    _overwrite(_shards(folder)[-1])
    with pytest.raises(ShardChanged):
        checkpoint.fingerprint()
    assert len(CheckpointMap.open(folder).fingerprint().whole) == 64


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_disappears_in_mid_swap_is_read_on_from_its_open_descriptor(
    on_thread: OnThread, folder: Path, answer: Answer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    right = answer(LATE)
    on_thread(Engine.evict)
    shards = list(folder.glob("*.safetensors"))

    def replaced() -> None:
        for shard in shards:
            shard.unlink()
            shard.write_bytes(b"something else")

    monkeypatch.setattr(reader_module.os, "preadv", _from(number, replaced))
    assert answer(LATE) == right


def test_a_shard_that_is_replaced_before_anything_was_read_from_it_is_read_as_it_was_when_the_model_was_opened(
    engine: Engine, folder: Path, answer: Answer, ask: Ask, open_engine: Open
) -> None:
    right = answer(LATE)
    fresh = open_engine(folder, dtype=engine.plan.dtype)
    for shard in folder.glob("*.safetensors"):
        size = shard.stat().st_size
        shard.unlink()
        shard.write_bytes(bytes(size))
    *_, end = fresh.generate([ask(PROMPT, LATE, max_tokens=4, ignore_eos=True)])
    assert isinstance(end, FinishedEvent)
    assert end.text == right


def test_a_shard_that_is_gone_is_missed_when_the_model_is_opened(folder: Path, open_engine: Open) -> None:
    next(iter(folder.glob("*.safetensors"))).unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        open_engine(folder)


def test_a_disk_that_stalls_fails_its_request_alone_and_is_used_again_when_it_comes_back(
    engine: Engine, on_thread: OnThread, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = {one: answer(one) for one in (EARLY, LATE)}
    on_thread(Engine.evict)
    answer(EARLY)
    real, gate = os.preadv, threading.Event()

    def held(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        gate.wait()
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(engine._reader, "_patience", 0.1)
    monkeypatch.setattr(reader_module.os, "preadv", held)
    try:
        with pytest.raises(DiskError, match="The disk stalls"):
            answer(LATE)
        assert answer(EARLY) == right[EARLY]
        with pytest.raises(DiskError, match="The disk stalls"):  # the threads are still held: no hang
            answer(LATE)
    finally:
        gate.set()
    assert answer(LATE) == right[LATE]
    assert on_thread(_leased) == 0


PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from engine import reader
from engine.config import EngineConfig
from engine.engine import Engine
from engine.requests import GenerationRequest, Sampling
from engine.worker import EngineWorker
from store.records import Selection

def leave(*_):
    raise SystemExit(7)

signal.signal(signal.SIGTERM, leave)
real = os.preadv
with Engine.open(EngineConfig(Path(sys.argv[1]))) as engine, EngineWorker(engine) as worker:
    def slow(*args):
        os.write(1, b"reading\\n")  # whole, whichever of the reading threads writes
        time.sleep(0.5)
        return real(*args)
    reader.os.preadv = slow
    request = GenerationRequest(tuple(range(9)), Selection.of([[0, 1, 2]] * 3), "mask", Sampling(max_tokens=2))
    try:
        list(worker.submit(request))
    finally:
        print("leaving", flush=True)
"""


@pytest.mark.slow
def test_sigterm_in_mid_swap_ends_the_process_in_order(folder: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading\n"
        process.send_signal(signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 7, errors
    assert "leaving" in rest
    assert "Traceback" not in errors


def test_a_lease_taken_ahead_is_whole_once_it_was_waited_for(engine: Engine) -> None:
    with engine.lease(LATE, ahead=True) as lease:
        assert (lease.experts, lease.experts_paged) == (12, 12)
        engine.bank.wait(lease)
        assert not engine.bank.residency.unfilled
        assert lease.seconds > 0


def test_waiting_for_a_lease_taken_ahead_raises_what_made_its_read_fail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module.os, "preadv", _fails(2))
    with pytest.raises(CheckpointError, match="Input/output error"), engine.lease(LATE, ahead=True) as lease:
        engine.bank.wait(lease)
    assert (engine.residency().leased, engine.residency().experts_paged) == (0, engine.residency().resident)
