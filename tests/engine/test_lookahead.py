"""Exact mode's read-ahead: it changes no answer under any budget, takes no leased slot, and its waste is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.card import ModelCard
from engine.config import EngineConfig
from engine.delivery import Delivery
from engine.engine import Engine
from engine.guesses import Guesses
from engine.plan import plan_memory
from engine.requests import GenerationRequest, Sampling, TokenEvent
from engine.residency import ABSENT, Load, Residency
from store.errors import CheckpointError, InvalidInput
from store.records import ExpertKey, Selection

Checkpoint = Callable[..., Path]
Open = Callable[..., Engine]

SHAPE = {"num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2}


def _slots(folder: Path, slots: int) -> dict[str, int]:
    """Fields of an engine with so many slots."""
    plan = plan_memory(ModelCard.read(folder), EngineConfig(folder, memory=2**40, chunk_tokens=64))
    return {"memory": plan.fixed_bytes + slots * plan.slot_bytes, "chunk_tokens": 64}


def _tokens(engine: Engine, *requests: GenerationRequest) -> list[list[int]]:
    engine.tokenizer.eos = frozenset()
    made: list[list[int]] = [[] for _ in requests]
    for event in engine.generate(requests):
        if isinstance(event, TokenEvent):
            made[event.row].append(event.token)
    return made


def test_exact_logits_are_the_plain_models_under_any_budget_and_read_ahead_beside_masked_rows(
    checkpoint: Checkpoint, open_engine: Open, plain_model: Callable[[Path], Any]
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    plain, roomy = plain_model(folder), open_engine(folder)
    rng = random.Random(0)
    card = roomy.card
    floor, whole = card.layers * card.top_k, card.layers * card.experts
    for slots in (floor, floor + 1, rng.randrange(floor, whole), rng.randrange(floor, whole), whole - 1, whole):
        engine = open_engine(folder, **_slots(folder, slots), read_ahead=rng.choice((1, 3, 8)))
        ids, mask = torch.randint(0, 256, (3, 9)), torch.ones(3, 9, dtype=torch.long)
        with torch.no_grad():
            wanted = plain(input_ids=ids).logits
        alone = engine.forward(ids, mask, [None] * 3)
        assert torch.allclose(alone, wanted, atol=1e-4), slots
        most = max(card.top_k, (slots - 1) // card.layers)  # leaves a slot to page through
        if card.layers * most < slots:
            masked = Selection.of([rng.sample(range(card.experts), most) for _ in range(card.layers)])
            mixed = engine.forward(ids, mask, [None, masked, None])
            assert torch.allclose(mixed[[0, 2]], wanted[[0, 2]], atol=1e-4), slots
            limited = roomy.forward(ids, mask, [masked] * 3)
            assert torch.allclose(mixed[1], limited[1], atol=1e-4), slots
        engine.bank.residency.check()


def test_answers_are_the_same_with_and_without_and_every_byte_is_accounted_for(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    requests = [
        GenerationRequest(tuple(range(30, 30 + 7 * row)), None, "exact", Sampling(max_tokens=12)) for row in (1, 2, 3)
    ]
    without = open_engine(folder, **_slots(folder, 20), read_ahead=0)
    plain = _tokens(without, *requests)
    assert without.residency().experts_guessed == 0
    for most in (1, 4, 8):
        engine = open_engine(folder, **_slots(folder, 20), read_ahead=most)
        assert _tokens(engine, *requests) == plain
        found = engine.residency()
        assert 0 < found.guessed_right <= found.experts_guessed
        assert found.bytes_paged == found.experts_paged * engine.card.expert_bytes
        assert found.bytes_read >= found.bytes_paged + found.bytes_wasted
        assert found.leased == 0


def test_never_more_reads_ahead_than_the_bound(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    engine = open_engine(folder, **_slots(folder, 30), read_ahead=3)
    under_way: list[int] = []
    begin = Guesses.begin

    def watched(self: Guesses) -> None:
        begin(self)
        under_way.append(len(self._under_way))

    monkeypatch.setattr(Guesses, "begin", watched)
    engine.forward(torch.randint(0, 256, (1, 12)), torch.ones(1, 12, dtype=torch.long), [None])
    assert max(under_way) == 3
    assert not engine.bank.guesses._under_way


def test_a_leased_expert_keeps_its_slot_while_others_are_read_ahead(checkpoint: Checkpoint, open_engine: Open) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    engine = open_engine(folder, **_slots(folder, 20), read_ahead=8)
    leased = Selection.of([[0, 1, 2, 3]] * 4)
    table = engine.bank.residency.table
    with engine.lease(leased):
        before = {key: table[key.layer][key.expert] for key in leased}
        for _ in range(5):
            engine.forward(torch.randint(0, 256, (1, 12)), torch.ones(1, 12, dtype=torch.long), [None])
        assert {key: table[key.layer][key.expert] for key in leased} == before
        assert engine.residency().leased == len(leased)


def test_a_pass_that_fails_leaves_no_read_ahead_behind(
    checkpoint: Checkpoint, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    engine = open_engine(folder, **_slots(folder, 20), read_ahead=8)
    begin = Guesses.begin

    def fail(self: Guesses) -> None:
        begin(self)
        if self._under_way:
            raise RuntimeError("in mid pass")

    monkeypatch.setattr(Guesses, "begin", fail)
    ids = torch.randint(0, 256, (1, 12))
    with pytest.raises(RuntimeError, match="in mid pass"):
        engine.forward(ids, torch.ones_like(ids), [None])
    assert engine.residency().leased == 0
    monkeypatch.undo()
    engine.forward(ids, torch.ones_like(ids), [None])


def test_the_default_reads_nothing_ahead_and_neither_does_an_engine_that_holds_everything(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    assert open_engine(folder, **_slots(folder, 20)).bank.guesses.most == 0
    assert open_engine(folder, read_ahead=4).bank.guesses.most == 0  # everything is resident in the end
    with pytest.raises(InvalidInput, match="at least 0"):
        EngineConfig(folder, read_ahead=-1)


def test_experts_that_are_cast_on_their_way_are_read_ahead_like_others(
    checkpoint: Checkpoint, open_engine: Open
) -> None:
    folder = checkpoint("olmoe", **SHAPE)
    plan = plan_memory(
        ModelCard.read(folder), EngineConfig(folder, memory=2**40, chunk_tokens=64, dtype="bfloat16", max_batch=2)
    )
    fields = {"memory": plan.memory_for(0.4), "chunk_tokens": 64, "dtype": "bfloat16", "max_batch": 2}
    request = GenerationRequest(tuple(range(30, 50)), None, "exact", Sampling(max_tokens=12))
    ahead = open_engine(folder, **fields, read_ahead=4)
    assert not ahead.bank.arrivals.direct
    assert _tokens(ahead, request) == _tokens(open_engine(folder, **fields), request)
    guessed = ahead.residency()
    assert 0 < guessed.guessed_right <= guessed.experts_guessed
    assert guessed.bytes_read >= guessed.bytes_paged + guessed.bytes_wasted


class _Transfer:
    def __init__(self) -> None:
        self.over = self.landed = False
        self.read = 7


class _Reads:
    """Where the bank stands: pins a slot for every guess and says how its read goes."""

    def __init__(self, slots: int) -> None:
        self.residency = Residency(3, 8, slots)
        self.transfers: dict[ExpertKey, _Transfer] = {}
        self.broken = False

    def begin(self, key: ExpertKey) -> Delivery:
        if self.broken:
            raise CheckpointError("gone")
        [load] = self.residency.plan([key], passing=True)
        self.transfers[key] = _Transfer()
        return Delivery(self.transfers[key], [[Load(key, load.slot)]], 5)  # type: ignore[arg-type]

    def end(self, key: ExpertKey, _: Delivery) -> None:
        if self.transfers[key].landed:
            self.residency.landed(key)
        self.residency.release([key])

    def land(self, key: ExpertKey) -> None:
        self.transfers[key].over = self.transfers[key].landed = True


def _guesses(slots: int, most: int) -> tuple[Guesses, _Reads]:
    reads = _Reads(slots)
    return Guesses(reads.residency, most, reads.begin, reads.end), reads


def test_a_wrong_guess_is_given_up_and_a_right_one_that_failed_is_read_anew() -> None:
    guesses, reads = _guesses(slots=6, most=8)
    guesses.expect(1, [4, 5, 6, 7])
    guesses.begin()
    reads.land(ExpertKey(1, 4))
    reads.transfers[ExpertKey(1, 6)].over = True  # failed
    [urgent] = guesses.judge(1, [4, 5, 6])  # 7 was wrong
    assert urgent.group.keys() == {ExpertKey(1, 5)}
    assert [reads.residency.slot(ExpertKey(1, expert)) != ABSENT for expert in (4, 5, 6, 7)] == [
        True,
        True,
        False,
        False,
    ]
    reads.land(ExpertKey(1, 5))
    assert len(guesses.close(1)) == 2
    totals = guesses.totals
    assert (totals.experts, totals.right, totals.right_bytes, totals.wasted_bytes) == (4, 2, 10, 14)
    reads.residency.check()
    assert reads.residency.leased == 0


def test_guesses_take_only_slots_that_are_free_and_evict_nothing_that_is_guessed_too() -> None:
    guesses, reads = _guesses(slots=4, most=8)
    held = [ExpertKey(0, 0), ExpertKey(0, 1)]
    for key in (*held, ExpertKey(1, 2), ExpertKey(2, 0)):
        reads.residency.plan([key], passing=True)
        reads.residency.landed(key)
    reads.residency.release([ExpertKey(1, 2), ExpertKey(2, 0)])  # the first to be evicted is one that is expected
    guesses.expect(1, [5, 2, 6])
    guesses.begin()
    assert reads.residency.slot(ExpertKey(1, 2)) != ABSENT
    assert reads.residency.slot(ExpertKey(1, 6)) == ABSENT
    assert reads.residency.slot(ExpertKey(2, 0)) == ABSENT
    assert reads.residency.slot(ExpertKey(1, 5)) != ABSENT
    assert all(reads.residency.slot(key) != ABSENT for key in held)
    guesses.drop_all()
    assert reads.residency.leased == len(held)


def test_a_file_that_is_gone_ends_guessing_in_silence() -> None:
    guesses, reads = _guesses(slots=4, most=8)
    reads.broken = True
    guesses.expect(1, [4, 5])
    guesses.begin()
    assert guesses.totals.experts == 0
    assert guesses.judge(1, [4]) == []
