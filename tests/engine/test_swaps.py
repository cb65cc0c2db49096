"""Leases that begin before their bytes are there, on a disk that fails, holds back or comes back late.

A state machine drives a bank over a real checkpoint; whatever happens, an expert that counts as there has the bytes of
the file, and once all leases have ended no slot is held.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from engine import plan as plan_module
from engine import reader as reader_module
from engine.bank import Bank, Lease
from engine.layout import SlotLayout
from engine.reader import Reader
from engine.residency import ABSENT
from engine.ring import Ring
from engine.skeleton import build_skeleton
from engine.tiny import write_tiny
from engine.tiny_quantised import write_fp8
from store.checkpoint import CheckpointMap
from store.errors import BudgetError, CheckpointError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection

LAYERS, EXPERTS, SLOTS = 3, 8, 14
PATIENCE = 0.15


@cache
def _folder(kind: str) -> Path:
    folder = write_tiny("qwen2_moe", Path(tempfile.mkdtemp(prefix="moepager-swaps-")))
    return write_fp8(folder, (8, 5)) if kind == "fp8" else folder


@cache
def _checkpoint(dtype: str, kind: str = "plain") -> tuple[SlotLayout, ExpertMap]:
    checkpoint = CheckpointMap.open(_folder(kind))
    experts = ExpertMap.build(checkpoint)
    return build_skeleton(checkpoint, experts, dtype, False)[0].layout, experts


@cache
def _truth(dtype: str, kind: str = "plain") -> dict[ExpertKey, tuple[torch.Tensor, ...]]:
    layout, experts = _checkpoint(dtype, kind)
    with Reader(2**16) as reader:
        bank = Bank(layout, experts, LAYERS * EXPERTS, torch.device("cpu"), reader)
        with bank.lease(Selection.whole(LAYERS, EXPERTS)):
            keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
            return {key: tuple(view.clone() for view in bank.weights(bank.residency.slot(key))) for key in keys}


class Disk:
    """Stands in for preadv: fails at a certain read, or holds all reads back until it goes on.

    Bytes that come back late are those of their own expert: in a slot that has another one by then they are wrong.
    """

    def __init__(self) -> None:
        self.fails_at = -1
        self.gate = threading.Event()
        self.gate.set()
        self._real = os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        self.fails_at -= 1
        if self.fails_at == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.gate.wait()
        return self._real(descriptor, buffers, offset)


LEASES = st.lists(
    st.frozensets(st.integers(0, EXPERTS - 1), min_size=1, max_size=4), min_size=LAYERS, max_size=LAYERS
).map(Selection.of)


class SwapMachine(RuleBasedStateMachine):
    """Leases with and without waiting, polled and released at any time; visits that compute; reads that fail or stall.

    Several are under way at once. Bytes go straight into their slots.
    """

    dtype, kind = "float32", "plain"

    def __init__(self) -> None:
        super().__init__()
        layout, experts = _checkpoint(self.dtype, self.kind)
        self.truth = _truth(self.dtype, self.kind)
        self.disk = Disk()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(reader_module.os, "preadv", self.disk)
        self.reader = Reader(2**16, threads=2, patience=PATIENCE)
        self.bank = Bank(layout, experts, SLOTS, torch.device("cpu"), self.reader)
        self.faulty = False  # whether a fault was ever injected: it may come out much later
        assert self.bank.arrivals.direct == (self.dtype == "float32")
        self.leases: list[tuple[Selection, AbstractContextManager[Lease], Lease]] = []

    @rule(selection=LEASES, ahead=st.booleans())
    def lease(self, selection: Selection, ahead: bool) -> None:
        wanted = set(selection) | self._held()
        manager = self.bank.lease(selection, ahead=ahead)
        try:
            lease = manager.__enter__()
        except BudgetError:
            assert len(wanted) > SLOTS
        except CheckpointError:
            assert not ahead
            assert self.faulty
        else:
            assert len(wanted) <= SLOTS
            assert lease.experts == len(selection)
            self.leases.append((selection, manager, lease))

    # Which lease is drawn as any number: threads decide which leases there are, and draws must not depend on them.
    @rule(number=st.integers(0, 15))
    def release(self, number: int) -> None:
        if self.leases:
            self._release(number % len(self.leases))

    @rule(number=st.integers(0, 15), layer=st.integers(0, LAYERS - 1))
    def compute(self, number: int, layer: int) -> None:
        """A layer of a request's pass; the request dies of a failed read, and only then."""
        if not self.leases:
            return
        place = number % len(self.leases)
        experts = self.leases[place][0].experts[layer]
        try:
            self._visit(layer, experts)
        except CheckpointError:
            assert self.faulty
            self._release(place)

    @rule(number=st.integers(0, 15))
    def poll(self, number: int) -> None:
        """A token boundary of a request that waits; it dies of a failed read, and only then."""
        if not self.leases:
            return
        place = number % len(self.leases)
        selection, _, lease = self.leases[place]
        try:
            there = self.bank.poll(lease)
        except CheckpointError:
            assert self.faulty
            self._release(place)
        else:
            assert there == self.bank.holds(selection)
            assert there == (self.bank.missing_bytes(lease) == 0)

    @rule()
    def work(self) -> None:
        """A slice of the owner's own work at a token boundary."""
        self.bank.work()

    @rule(layer=st.integers(0, LAYERS - 1), experts=st.frozensets(st.integers(0, EXPERTS - 1), min_size=1, max_size=5))
    def compute_exactly(self, layer: int, experts: frozenset[int]) -> None:
        try:
            self._visit(layer, sorted(experts))
        except CheckpointError:
            assert self.faulty
        except BudgetError:
            assert self.bank.residency.available == 0

    @rule(after=st.integers(1, 5))
    def the_disk_will_fail(self, after: int) -> None:
        self.disk.fails_at, self.faulty = after, True

    @rule()
    def the_disk_holds_back(self) -> None:
        self.faulty = True
        self.disk.gate.clear()

    @rule()
    def the_disk_goes_on(self) -> None:
        self.disk.gate.set()

    @rule()
    def evict_idle(self) -> None:
        self.bank.residency.evict_idle()

    def _visit(self, layer: int, experts: Sequence[int]) -> None:
        seen = []
        for expert, slot in self.bank.visit(layer, experts):
            seen.append(expert)
            self._is_true(ExpertKey(layer, expert), slot)
        assert sorted(seen) == sorted(experts)

    def _is_true(self, key: ExpertKey, slot: int) -> None:
        assert all(torch.equal(*pair) for pair in zip(self.bank.weights(slot), self.truth[key], strict=True)), key

    def _held(self) -> set[ExpertKey]:
        return {key for selection, _, _ in self.leases for key in selection}

    def _release(self, place: int) -> None:
        self.leases.pop(place)[1].__exit__(None, None, None)

    @invariant()
    def what_counts_as_there_has_the_bytes_of_the_file(self) -> None:
        residency = self.bank.residency
        residency.check()
        for layer, row in enumerate(residency.table):
            for expert, slot in enumerate(row):
                if slot != ABSENT and slot not in residency.unfilled:
                    self._is_true(ExpertKey(layer, expert), slot)

    @invariant()
    def every_leased_expert_has_a_slot_and_only_those_are_pinned(self) -> None:
        held = self._held()
        assert all(self.bank.residency.slot(key) != ABSENT for key in held)
        assert self.bank.residency.leased == len(held)

    def teardown(self) -> None:
        self.disk.gate.set()
        while self.leases:
            self._release(0)
        assert not self.bank.residency.unfilled
        assert self.bank.residency.available == SLOTS
        self.reader.close()
        self.patch.undo()


SwapMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestSwaps = SwapMachine.TestCase


class StagedSwapMachine(SwapMachine):
    """Bytes go by way of a ring of buffers, where they are cast; all experts of a layer fit one of them."""

    dtype = "bfloat16"

    @invariant()
    def every_buffer_is_free_or_holds_experts_that_somebody_wants(self) -> None:
        ring = self.bank.arrivals.way
        assert isinstance(ring, Ring)
        used = [cargo.buffer for cargo in ring._busy]
        assert len({id(buffer) for buffer in (*used, *ring._free)}) == len(ring.staging.buffers)
        for cargo in (*ring._busy, *ring._queue):
            assert not cargo.there
            for load in cargo.loads:
                assert self.bank.residency.slot(load.key) == load.slot
                assert load.slot in self.bank.residency.unfilled
                assert self.bank.arrivals.is_under_way(load.key)

    def teardown(self) -> None:
        super().teardown()
        ring = self.bank.arrivals.way
        assert isinstance(ring, Ring)
        assert len(ring._free) == len(ring.staging.buffers)


class NarrowSwapMachine(StagedSwapMachine):
    """Two buffers of one expert each: every lease asks for more than the ring holds."""

    def __init__(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_module, "BUFFER_BYTES", 1)
            patch.setattr(plan_module, "BUFFERS", 2)
            super().__init__()


class Fp8SwapMachine(StagedSwapMachine):
    """Bytes are multiplied by the scales of their blocks on their way."""

    kind = "fp8"


for machine in (StagedSwapMachine, NarrowSwapMachine, Fp8SwapMachine):
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=15, deadline=None)
TestStagedSwaps = StagedSwapMachine.TestCase
TestNarrowSwaps = NarrowSwapMachine.TestCase
TestFp8Swaps = Fp8SwapMachine.TestCase


ONE, OTHER = Selection.of([[0, 1, 2, 3]] * LAYERS), Selection.of([[4, 5, 6, 7]] * LAYERS)


def test_bytes_that_come_back_after_their_lease_was_given_up_spoil_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first read of a lease hangs, the lease ends, another takes all of its slots; then the read comes back."""
    layout, experts = _checkpoint("float32")
    gate, hangs, real, lock = threading.Event(), threading.Event(), os.preadv, threading.Lock()

    def hang_once(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        with lock:
            is_first = not hangs.is_set()
            hangs.set()
        assert not is_first or gate.wait(20)
        return real(descriptor, buffers, offset)

    with Reader(2**16, threads=2) as reader:
        bank = Bank(layout, experts, len(ONE), torch.device("cpu"), reader)
        monkeypatch.setattr(reader_module.os, "preadv", hang_once)
        with bank.lease(ONE, ahead=True) as given_up:
            assert hangs.wait(20)
        assert given_up.delivery is not None
        with bank.lease(OTHER):
            gate.set()
            while given_up.delivery.passage._under_way:
                time.sleep(0.001)
            reader.close()  # its threads have done all they ever will
            for key in OTHER:
                held = zip(bank.weights(bank.residency.slot(key)), _truth("float32")[key], strict=True)
                assert all(torch.equal(*pair) for pair in held), key
        assert bank.residency.leased == 0
