"""Leases that begin before their bytes are there, on a disk that fails, holds back or comes back late.

A state machine drives a bank over a real checkpoint; whatever happens, an expert that counts as there has the bytes of
the file, and once all leases have ended no slot is held.
"""

from __future__ import annotations

import errno
import os
import tempfile
import threading
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

from engine import reader as reader_module
from engine.bank import Bank, Lease
from engine.layout import SlotLayout
from engine.reader import Reader
from engine.residency import ABSENT
from engine.skeleton import build_skeleton
from engine.tiny import write_tiny
from store.checkpoint import CheckpointMap
from store.errors import BudgetError, CheckpointError
from store.experts import ExpertMap
from store.records import ExpertKey, Selection

LAYERS, EXPERTS, SLOTS = 3, 8, 14
PATIENCE = 0.15


@cache
def _checkpoint() -> tuple[SlotLayout, ExpertMap]:
    folder = write_tiny("qwen2_moe", Path(tempfile.mkdtemp(prefix="moepager-swaps-")))
    checkpoint = CheckpointMap.open(folder)
    experts = ExpertMap.build(checkpoint)
    return build_skeleton(checkpoint, experts, "float32")[0].layout, experts


@cache
def _truth() -> dict[ExpertKey, tuple[torch.Tensor, ...]]:
    layout, experts = _checkpoint()
    with Reader(2**16) as reader:
        bank = Bank(layout, experts, LAYERS * EXPERTS, torch.device("cpu"), reader)
        with bank.lease(Selection.whole(LAYERS, EXPERTS)):
            keys = [ExpertKey(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
            return {key: tuple(view.clone() for view in bank.views[bank.residency.slot(key)]) for key in keys}


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
    """Leases with and without waiting, released at any time; visits that compute; reads that fail or stall."""

    def __init__(self) -> None:
        super().__init__()
        layout, experts = _checkpoint()
        self.truth = _truth()
        self.disk = Disk()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(reader_module.os, "preadv", self.disk)
        self.reader = Reader(2**16, threads=2, patience=PATIENCE)
        self.bank = Bank(layout, experts, SLOTS, torch.device("cpu"), self.reader)
        self.faulty = False  # whether a fault was ever injected: it may come out much later
        self.leases: list[tuple[Selection, AbstractContextManager[Lease]]] = []

    @rule(selection=LEASES, ahead=st.booleans())
    def lease(self, selection: Selection, ahead: bool) -> None:
        wanted = set(selection) | {key for held, _ in self.leases for key in held}
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
            self.leases.append((selection, manager))

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
        assert all(torch.equal(*pair) for pair in zip(self.bank.views[slot], self.truth[key], strict=True)), key

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
        held = {key for selection, _ in self.leases for key in selection}
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
