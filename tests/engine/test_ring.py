"""Buffers between file and slot: filled by threads, emptied by the owner, never two experts' at once."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import plan as plan_module
from engine import reader as reader_module
from engine.bank import Bank
from engine.engine import Engine
from engine.plan import MIB, RingShape
from engine.reader import Reader
from engine.ring import Cargo, Ring
from engine.skeleton import build_skeleton
from engine.staging import Staging
from engine.tiny import write_tiny
from engine.tiny_quantised import write_fp8
from store.checkpoint import CheckpointMap
from store.errors import CheckpointError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection

LAYERS, EXPERTS = 3, 8
SIX, OTHERS = Selection.of([[0, 1]] * LAYERS), Selection.of([[4, 5]] * LAYERS)
Make = Callable[..., Bank]


class Disk:
    """Stands in for preadv: remembers where it was asked to read, and holds reads back while the gate is closed."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.fails = False
        self.gate, self.called, self._real = threading.Event(), threading.Event(), os.preadv
        self.gate.set()

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.asked.append(offset)
        self.called.set()
        assert self.gate.wait(20)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(descriptor, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(reader_module.os, "preadv", disk)
    yield disk
    disk.gate.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("qwen2_moe", tmp_path_factory.mktemp("ring"))


@pytest.fixture
def make(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """`make(buffers, threads)`: a bank for every expert, which are cast on their way, an expert a buffer."""
    readers: list[Reader] = []
    monkeypatch.setattr(plan_module, "BUFFER_BYTES", 1)

    def bank(buffers: int, threads: int = 2, folder: Path = folder, dtype: str = "bfloat16") -> Bank:
        monkeypatch.setattr(plan_module, "BUFFERS", buffers)
        checkpoint = CheckpointMap.open(folder)
        experts = ExpertMap.build(checkpoint)
        layout = build_skeleton(checkpoint, experts, dtype, False)[0].layout
        readers.append(Reader(2**16, threads))
        return Bank(layout, experts, LAYERS * EXPERTS, torch.device("cpu"), readers[-1])

    yield bank
    for reader in readers:
        reader.close()


def _ring(bank: Bank) -> Ring:
    assert isinstance(bank.arrivals.way, Ring)
    return bank.arrivals.way


def _settle(ring: Ring) -> None:
    """Until the threads have read all that the buffers take."""
    while not all(cargo.landed for cargo in ring._busy):
        ring.rest(1)


def _loads(cargos: Sequence[Cargo]) -> list[ExpertKey]:
    return [load.key for cargo in cargos for load in cargo.loads]


def test_no_more_is_read_than_the_buffers_hold_until_the_owner_has_emptied_one(make: Make, disk: Disk) -> None:
    bank = make(2)
    ring, keys = _ring(bank), sorted(SIX)
    with bank.lease(SIX, ahead=True) as lease:
        _settle(ring)
        assert _loads(ring._busy) == keys[:2]
        held = [cargo.buffer for cargo in ring._busy]
        before = [buffer.memory.clone() for buffer in held if buffer is not None]
        assert len(ring._queue) == 4
        assert ring.turn()
        _settle(ring)
        assert _loads(ring._busy) == keys[1:3]  # into the buffer that was emptied
        assert held[1] is not None
        assert held[1].memory.equal(before[1])  # not into the one that was not
        bank.wait(lease)
        assert bank.holds(SIX)
        assert (lease.experts_paged, bank.paged.experts) == (6, 6)
        assert 0 < lease.seconds < 20
    assert len(ring._free) == 2


def test_small_experts_of_a_layer_share_a_buffer_and_layers_do_not(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "BUFFER_BYTES", 3 * 3 * 16 * 32 * 4)  # three experts
    bank = make(5)
    size = dict.fromkeys(Selection.of([range(8)] * LAYERS), 3 * 16 * 32 * 4)
    assert bank.arrivals.nbytes(size) == sum(size.values())
    with bank.lease(Selection.of([range(4), range(3), [7]]), ahead=True) as lease:
        ring = _ring(bank)
        groups = [len(cargo.loads) for cargo in (*ring._busy, *ring._queue)]
        assert groups == [3, 1, 3, 1]
        bank.wait(lease)


def test_a_read_that_fails_frees_every_buffer_and_the_next_lease_is_served(make: Make, disk: Disk) -> None:
    bank = make(2)
    disk.fails = True
    with bank.lease(SIX, ahead=True) as lease, pytest.raises(CheckpointError, match="Input/output error"):
        bank.wait(lease)
    assert (len(_ring(bank)._free), bank.residency.resident, bank.paged.experts) == (2, 0, 0)
    disk.fails = False
    with bank.lease(OTHERS):
        assert bank.holds(OTHERS)


def test_a_lease_that_is_given_up_frees_its_buffers_while_the_disk_still_holds_its_reads(
    make: Make, disk: Disk
) -> None:
    bank = make(2, threads=1)
    ring = _ring(bank)
    disk.gate.clear()
    with bank.lease(SIX, ahead=True):
        assert disk.called.wait(20)
        assert not ring._free
    assert (len(ring._free), len(ring._queue)) == (2, 0)
    with bank.lease(OTHERS, ahead=True) as lease:
        assert _loads(ring._busy) == sorted(OTHERS)[:2]
        disk.gate.set()  # what comes back first is the other lease's
        bank.wait(lease)
        assert len(disk.asked) == 1 + 6  # of what was given up, only what the disk had already
        alone = make(5)
        with alone.lease(OTHERS):
            for key in OTHERS:
                pairs = zip(*(b.weights(b.residency.slot(key)) for b in (bank, alone)), strict=True)
                assert all(torch.equal(*pair) for pair in pairs), key
    assert bank.paged.experts == 6


def test_what_is_urgent_is_read_next_before_all_that_has_not_begun(make: Make, disk: Disk) -> None:
    bank = make(3, threads=1)
    ring = _ring(bank)
    disk.gate.clear()
    with bank.lease(SIX, ahead=True) as lease:
        assert disk.called.wait(20)  # one read is with the disk, two buffers wait for the thread
        visit = bank.visit(2, [7])
        waiting = threading.Thread(target=lambda: next(visit))
        waiting.start()
        disk.called.clear()
        disk.gate.set()
        assert disk.called.wait(20)
        spans = bank.arrivals._experts.span(ExpertKey(2, 7)).parts
        assert any(abs(disk.asked[1] - part.offset) <= 4096 for part in spans)
        waiting.join(20)
        visit.close()
        bank.wait(lease)
        assert bank.paged.bytes_read < 1.6 * bank.paged.bytes_needed + 7 * 2 * 4096  # nothing was read twice
        assert len(ring._free) == 3


def test_a_read_on_a_guess_that_proves_right_overtakes_others(make: Make, disk: Disk) -> None:
    bank = make(2, threads=1)
    ring = _ring(bank)
    disk.gate.clear()
    with bank.lease(SIX, ahead=True) as lease:
        assert disk.called.wait(20)
        with bank.lease(Selection.of([[7], [7], [7]]), ahead=True) as guess:
            assert guess.delivery is not None
            bank.arrivals.hurry(guess.delivery)
            assert [load.expert for load in _loads([*ring._busy[1:], *ring._queue])][:3] == [7, 7, 7]
            disk.gate.set()
            bank.wait(guess)
            assert guess.delivery.passage.landed
        bank.wait(lease)


def test_a_file_that_is_gone_is_an_error_of_who_begins_and_leaves_nothing_behind(make: Make, tmp_path: Path) -> None:
    folder = write_tiny("qwen2_moe", tmp_path / "m")
    bank = make(2, folder=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Can't open"), bank.lease(SIX, ahead=True):
        pytest.fail("it can't begin")
    assert (len(_ring(bank)._free), bank.residency.leased) == (2, 0)


def test_a_reader_that_is_closed_is_heard_of_by_who_waits(make: Make, disk: Disk) -> None:
    bank = make(2, threads=1)
    with bank.lease(SIX, ahead=True) as lease:
        disk.gate.clear()
        bank.arrivals.work()
        closing = threading.Thread(target=_ring(bank)._reader.close)
        closing.start()
        disk.gate.set()
        closing.join(20)
        with pytest.raises(Exception, match=r"given up|after close"):
            bank.wait(lease)


class _Event:
    """Stands in for a device that copies on its own: `over` when the test says so."""

    def __init__(self) -> None:
        self.over = self.waited_for = False

    def query(self) -> bool:
        return self.over

    def synchronize(self) -> None:
        self.over = self.waited_for = True


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[_Event]:
    """Of all copies that were begun."""
    made: list[_Event] = []
    fill = Staging.fill

    def begin(*arguments: Any) -> Any:
        assert fill(*arguments) is None
        made.append(_Event())
        return made[-1]

    monkeypatch.setattr(Staging, "fill", begin)
    return made


def test_an_expert_that_a_device_still_copies_is_not_there_and_its_buffer_not_free(
    make: Make, events: list[_Event]
) -> None:
    bank = make(2)
    ring = _ring(bank)
    with bank.lease(Selection.of([[0], [0], [0]]), ahead=True) as lease:
        _settle(ring)
        first = ring._busy[0]
        ring.turn()
        ring.turn()
        assert len(events) == 2
        assert not ring.turn()  # both buffers are on their way out
        assert (len(ring._queue), len(ring._free), first.there) == (1, 0, False)
        events[0].over = True
        ring.turn()
        assert first.there
        assert (len(ring._queue), len(ring._busy)) == (0, 2)  # its buffer took the next
        bank.wait(lease)
        assert all(event.over for event in events)
    assert ring.bytes_per_second is not None


def test_a_lease_that_ends_while_a_device_copies_for_it_waits_for_the_copy(make: Make, events: list[_Event]) -> None:
    bank = make(2)
    ring = _ring(bank)
    with bank.lease(SIX, ahead=True):
        _settle(ring)
        ring.turn()
        assert not events[0].waited_for
    assert events[0].waited_for
    assert len(ring._free) == 2
    assert bank.residency.resident == 0


def test_what_goes_wrong_in_emptying_a_buffer_is_heard_by_who_wants_it_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make(2)
    fill = Staging.fill

    def explode(staging: Staging, buffer: Any, spans: Any, views: Any) -> Any:
        if {span.key for span in spans} & set(SIX):
            raise RuntimeError("out of luck")
        return fill(staging, buffer, spans, views)

    monkeypatch.setattr(Staging, "fill", explode)
    with bank.lease(SIX, ahead=True) as unlucky, bank.lease(OTHERS, ahead=True) as lucky:
        bank.wait(lucky)
        assert bank.holds(OTHERS)
        with pytest.raises(RuntimeError, match="out of luck"):
            bank.poll(unlucky)
    assert (len(_ring(bank)._free), bank.residency.leased) == (2, 0)


class _Allocations(TorchDispatchMode):
    """Of tensors whose memory is none of `known`."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["cast", "fp8"])
def test_buffers_are_emptied_straight_into_slots_without_memory_of_their_own(
    kind: str, make: Make, folder: Path, tmp_path: Path
) -> None:
    if kind == "fp8":
        folder = write_fp8(write_tiny("qwen2_moe", tmp_path / "m"), (8, 5))
    bank = make(5, folder=folder)
    staging = _ring(bank).staging
    scratch = [] if staging._scratch is None else list(vars(staging._scratch).values())
    known = [bank.memory, *(buffer.memory for buffer in staging.buffers), *scratch]
    with bank.lease(SIX):
        pass  # the table of meanings is made once
    with bank.lease(OTHERS, ahead=True), _Allocations(known) as allocations:
        _settle(_ring(bank))
        while _ring(bank).turn():
            _settle(_ring(bank))
    table = 256 * 4
    assert sum(size for size in allocations.sizes if size != table) == 0
    assert bank.paged.experts == 12


def test_a_swap_is_predicted_by_the_slower_of_reading_and_converting(
    folder: Path, open_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(folder, dtype="bfloat16")
    assert engine.admission.bytes_per_second == engine._reader.meter.bytes_per_second  # nothing was converted yet
    with engine.lease(SIX):
        pass
    for speed in (1.0, 1e15):
        monkeypatch.setattr(Ring, "bytes_per_second", speed)
        predicted = engine.admission.swap_seconds(OTHERS)
        slower = min(speed, engine._reader.meter.bytes_per_second or 0.0)
        assert predicted == 6 * engine.card.expert_bytes / slower


def test_a_ring_has_two_buffers_at_least_and_is_bounded_otherwise() -> None:
    for staged, experts in ((6144, 8), (74_000, 64), (6 * MIB, 64), (44 * MIB, 256), (352 * MIB, 8)):
        shape = RingShape.of(staged, experts)
        assert shape.nbytes >= staged
        assert 2 <= shape.buffers <= 5
        assert shape.buffers == 2 or shape.buffers * shape.nbytes <= 64 * MIB
    assert RingShape.of(352 * MIB, 8) == (2, 352 * MIB)
