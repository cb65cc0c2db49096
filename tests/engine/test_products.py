"""Our own products against torch in float64: every instruction set of this processor, odd shapes, threads, experts."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import addresses, products
from engine.engine import Engine
from engine.expert_shape import ExpertShape, Gate, Scales
from engine.kernels import FEW, PAIRS, WIDE, Kernels
from engine.products import Products, instruction_sets
from engine.requests import GenerationRequest
from engine.residency import NOBODY
from store.errors import InvalidInput
from store.records import Selection

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
GATES: list[Callable[[Tensor], Tensor]] = [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu]


@pytest.fixture(params=["AVX-512 BF16", "AVX-512", "AVX2", "SSE2", "NEON", "portable"])
def own(request: pytest.FixtureRequest) -> Iterator[Products]:
    """Each set that this processor has; one that it lacks is refused by name."""
    if request.param in instruction_sets():
        yield Products(request.param)
    else:
        with pytest.raises(KeyError, match=request.param):
            Products(request.param)
        yield Products(next(iter(instruction_sets())))


def _close(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    error = (ours.double() - truth).abs().max() / truth.abs().max().clamp(min=1e-9)
    assert float(error) < TOLERANCE[ours.dtype]


def test_they_are_built_wherever_there_is_a_c_compiler() -> None:
    compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
    assert not (compilers and products.missing), f"{compilers} at hand, but engine._products is {products.missing}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_a_product_is_that_of_float64(own: Products, dtype: torch.dtype, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        rows, outputs, columns = rng.randint(1, 17), rng.randint(1, 70), rng.randint(1, 300)
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, columns), (outputs, columns), (outputs,)))
        truth = F.linear(x.double(), weight.double())
        _close(own.linear(x, weight), truth)
        _close(own.linear(x, weight, bias), truth + bias.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_a_product_of_many_rows_is_that_of_float64_and_a_row_is_the_same_alone(
    own: Products, dtype: torch.dtype, seed: int, threads: Callable[[int], None]
) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        rows, outputs, columns = rng.randint(1, 150), rng.randint(1, 300), 2 * rng.randint(1, 200)
        x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((rows, columns), (outputs, columns), (outputs,)))
        truth = F.linear(x.double(), weight.double())
        found = []
        for count in (1, 2):
            threads(count)
            found.append(own.linear_many(x, weight, bias))
        _close(found[0], truth + bias.double())
        assert found[0].equal(found[1])
        row = rng.randrange(rows)
        assert own.linear_many(x[row : row + 1], weight, bias).equal(found[0][row : row + 1])
        _close(own.linear_many(x, weight), truth)


def test_many_rows_of_bfloat16_are_torchs_only_beside_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(40, 6).bfloat16(), torch.randn(4, 6).bfloat16()
    for tiles in (False, True):
        monkeypatch.setattr(products.compiled, "tiles", lambda there=tiles: there)
        for name in instruction_sets():
            own = Products(name)
            assert own.multiplies_many(x, weight) == (name in WIDE and not tiles)
            assert not own.multiplies_many(x.float(), weight.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_and_inputs_may_lie_anywhere(own: Products, dtype: torch.dtype) -> None:
    """Rows further apart than they are long, addresses that no vector is aligned to, inputs in pieces."""
    wide = torch.randn(9 * 50 + 1).to(dtype)[1:].view(9, 50)
    weight, x = wide[:, 3:40], torch.randn(37, 5).to(dtype).t()
    assert not x.is_contiguous()
    _close(own.linear(x, weight), x.double() @ weight.double().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [129, 513])
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads(
    columns: int, own: Products, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    x, weight = torch.randn(7, columns).to(dtype), torch.randn(1031, columns).to(dtype)  # enough bytes for threads
    threads(1)
    whole = own.linear(x, weight)
    for rows in (1, 2, 3):
        for row in range(8 - rows):
            assert own.linear(x[row : row + rows], weight).equal(whole[row : row + rows])
    for count in (2, 3):
        threads(count)
        assert own.linear(x, weight).equal(whole)


def test_no_number_stays_no_number_and_infinity_stays_infinite(own: Products) -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, float("inf")]], dtype=torch.bfloat16)
    y = own.linear(x, torch.ones(3, 2, dtype=torch.bfloat16))
    assert y[0].isnan().all()
    assert y[1].isposinf().all()


def _random_bank(slots: int, hidden: int, inner: int, gated: bool, biased: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    """Slots of odd parameters one after the other, and each slot's parameters as tensors."""
    up = inner * (1 + gated)
    shapes = [(up, hidden), (up,), (hidden, inner), (hidden,)]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
    offsets = [sum(sizes[:at]) for at in range(4)]
    bank = torch.zeros(slots, -(-sum(sizes) // 64) * 64, dtype=torch.uint8)
    views = []
    for row in bank:
        parts = [
            row[at : at + size].view(dtype).view(shape) for at, size, shape in zip(offsets, sizes, shapes, strict=True)
        ]
        for part in parts:
            part.copy_(torch.randn(part.shape) / part.shape[-1] ** 0.5)
        views.append(parts)
    fields = (addresses.DTYPES[dtype], int(gated), hidden, inner, bank.shape[1])
    places = (offsets[0], offsets[1] if biased else -1, offsets[2], offsets[3] if biased else -1)
    return bank, views, fields + places


def _truth(x: Tensor, views: Any, slots: list[int], weights: Tensor, gate: Any, gated: bool, biased: bool) -> Tensor:
    """[T, H] in float64, one choice at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for choice, slot in enumerate(slots):
        if slot == NOBODY:
            continue
        token, rank = divmod(choice, weights.shape[1])
        up, up_bias, down, down_bias = (part.double() for part in views[slot])
        h = F.linear(x[token].double(), up, up_bias if biased else None)
        h = gate(h[: len(h) // 2]) * h[len(h) // 2 :] if gated else gate(h)
        out[token] += weights[token, rank].double() * F.linear(h, down, down_bias if biased else None)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", range(4))
def test_experts_are_those_of_float64(
    own: Products, dtype: torch.dtype, biased: bool, gated: bool, activation: int
) -> None:
    rng = random.Random(activation)
    bank, views, fields = _random_bank(5, 37, 21, gated, biased, dtype)
    shape = ExpertShape(fields, dtype, Gate(activation))
    for tokens in (1, 2, 5, 16):
        x, weights = torch.randn(tokens, 37).to(dtype), torch.rand(tokens, 3).to(rng.choice(DTYPES))
        slots = [rng.choice([0, 1, 2, 3, 4, NOBODY]) for _ in range(tokens * 3)]
        outputs = torch.full((tokens * 3, 37), torch.nan)
        own.experts(shape, bank, x, slots, outputs)
        ours = own.combine(outputs, slots, weights, dtype)
        _close(ours, _truth(x, views, slots, weights, GATES[activation], gated, biased))


def test_an_expert_at_a_time_gives_the_same_to_the_last_bit(own: Products, threads: Callable[[int], None]) -> None:
    bank, _, fields = _random_bank(6, 520, 129, True, False, torch.bfloat16)
    shape, x = ExpertShape(fields, torch.bfloat16, Gate(0)), torch.randn(4, 520).bfloat16()
    slots = [0, 3, 3, 5, 1, 0, NOBODY, 2]
    whole, single = torch.zeros(8, 520), torch.zeros(8, 520)
    threads(2)
    own.experts(shape, bank, x, slots, whole)
    threads(1)
    for slot in {*slots} - {NOBODY}:
        own.experts(shape, bank, x, [slot if each == slot else NOBODY for each in slots], single)
    assert single.equal(whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("gated", "biased"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize(("hidden", "inner"), [(37, 21), (38, 22), (20, 46)])
def test_experts_of_many_tokens_are_those_of_float64(
    own: Products, dtype: torch.dtype, biased: bool, gated: bool, activation: int, hidden: int, inner: int
) -> None:
    """Some experts get no token, some more than go through at once; what no expert gets stays as it was. Even widths
    go to the processor's own instruction for bfloat16, where it has one."""
    rng = random.Random(activation)
    bank, views, fields = _random_bank(7, hidden, inner, gated, biased, dtype)
    shape = ExpertShape(fields, dtype, Gate(activation))
    assert shape.weights == hidden * inner * (2 + gated)
    for tokens in (1, 17, 90):
        x, weights = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 3).to(dtype)
        slots = rng.choices([0, 1, 3, 5, NOBODY], [8, 4, 1, 1, 1], k=tokens * 3)
        outputs = torch.zeros(tokens * 3, hidden)
        own.many(shape, bank, x, torch.tensor(slots).view(tokens, 3), outputs)
        assert not outputs[[slot == NOBODY for slot in slots]].any()
        ours = (outputs.view(tokens, 3, -1) * weights.unsqueeze(-1)).sum(1)
        _close(ours.to(dtype), _truth(x, views, slots, weights, GATES[activation], gated, biased))


def test_where_the_processor_multiplies_bfloat16_few_tokens_get_to_the_last_bit_what_one_gets(
    threads: Callable[[int], None],
) -> None:
    """Of an expert, whatever others get beside them; and of a product, in any number of rows."""
    if PAIRS not in instruction_sets():
        pytest.skip("this processor does not multiply bfloat16 itself")
    own = Products(PAIRS)
    bank, _, fields = _random_bank(5, 198, 78, True, True, torch.bfloat16)
    shape, x = ExpertShape(fields, torch.bfloat16, Gate(0)), torch.randn(90, 198).bfloat16()
    slots = torch.tensor([0] * 8 + [1] * 7 + [4] + [3] * 74).view(90, 1)
    many, one = torch.zeros(90, 198), torch.zeros(90, 198)
    threads(2)
    own.many(shape, bank, x, slots, many)
    for token in range(90):
        own.experts(shape, bank, x[token : token + 1], slots[token].tolist(), one[token : token + 1])
    assert one[:16].equal(many[:16])
    _close(many[16:], one[16:].double())
    weight = torch.randn(131, 199).bfloat16()
    x = torch.randn(90, 199).bfloat16()
    whole = own.linear(x, weight)
    for rows in (1, 2, 3, 4, 5, 7, 8, 31):
        for first in (0, 90 - rows):
            assert own.linear(x[first : first + rows], weight).equal(whole[first : first + rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [45, 46])
def test_an_expert_of_many_tokens_is_the_same_to_the_last_bit_whatever_is_beside_it(
    own: Products, dtype: torch.dtype, inner: int, threads: Callable[[int], None]
) -> None:
    bank, _, fields = _random_bank(4, 70, inner, True, False, dtype)
    shape, x = ExpertShape(fields, dtype, Gate(0)), torch.randn(150, 70).to(dtype)
    slots, whole = torch.randint(0, 4, (150, 2)), torch.zeros(300, 70)
    threads(2)
    own.many(shape, bank, x, slots, whole)
    threads(1)
    single, alone = torch.zeros(300, 70), torch.zeros(2, 70)
    for slot in range(4):
        own.many(shape, bank, x, slots.where(slots == slot, NOBODY), single)
    assert single.equal(whole)
    for token in (0, 77, 149):
        own.many(shape, bank, x[token : token + 1], slots[token : token + 1], alone)
        if own.instruction_set == PAIRS and dtype == torch.bfloat16:  # a single token is few
            torch.testing.assert_close(alone, whole[2 * token : 2 * token + 2], rtol=1e-2, atol=1e-2)
        else:
            assert alone.equal(whole[2 * token : 2 * token + 2])


def test_the_gate_is_right_far_from_zero_and_no_number_stays_none(own: Products) -> None:
    """Our own exponential inside SiLU, shown by an expert of one channel that changes nothing else."""
    bank, views, fields = _random_bank(1, 1, 1, False, False, torch.float32)
    views[0][0].fill_(1), views[0][2].fill_(1)
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 1e-30, torch.nan, 3e38, -3e38])])
    y = torch.zeros(len(x), 1)
    own.many(
        ExpertShape(fields, torch.float32, Gate(0)), bank, x.unsqueeze(1), torch.zeros(len(x), 1, dtype=torch.long), y
    )
    torch.testing.assert_close(y[:, 0], F.silu(x.double()).float(), rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_computes_the_same_with_and_without_them(
    family: str,
    dtype: str,
    checkpoint: Callable[..., Path],
    open_engine: Callable[..., Engine],
    random_selection: Callable[[Engine, random.Random], Selection],
) -> None:
    folder = checkpoint(family)
    with_own, without = (open_engine(folder, kernel=kernel, dtype=dtype) for kernel in ("own", "torch"))
    assert with_own.kernel.startswith("own (")
    rng = random.Random(3)
    ids, mask = torch.randint(0, 256, (3, 9)), (torch.arange(9) >= torch.tensor([[0], [2], [4]])).long()
    selections = [random_selection(with_own, rng), None, random_selection(with_own, rng)]
    ours, theirs = (engine.forward(ids, mask, selections) for engine in (with_own, without))
    real = mask.bool()
    if dtype == "float32":
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-4, atol=1e-4)
    else:  # rounding may send a token to another expert; on average they agree
        assert float((ours[real] - theirs[real]).abs().mean() / theirs[real].std()) < 0.1


def test_answers_do_not_depend_on_what_was_resident(
    checkpoint: Callable[..., Path], open_engine: Callable[..., Engine], ask: Callable[..., GenerationRequest]
) -> None:
    small = {"kernel": "own", "chunk_tokens": 64, "max_batch": 2}
    roomy = open_engine(checkpoint("olmoe"), memory=2**40, **small)
    tight = open_engine(checkpoint("olmoe"), memory=roomy.plan.floor_bytes, **small)
    wish = ask(tuple(range(9)), max_tokens=12)
    ours, theirs = (list(engine.generate([wish, wish])) for engine in (roomy, tight))
    tokens = [[getattr(event, "token", None) for event in events] for events in (ours, theirs)]
    assert tokens[0] == tokens[1]
    assert tight.residency().experts_paged > roomy.residency().experts_paged


def test_who_asks_for_them_where_they_can_not_be_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInput, match="not for float16") as refusal:
        Kernels.choose("own", torch.float16, torch.device("cpu"))
    assert refusal.value.param == "kernel"
    assert (
        Kernels.choose("auto", torch.float32, torch.device("cuda")).name
        == "torch (our own are for the CPU, not for cuda)"
    )
    monkeypatch.setattr(products, "missing", "not built at install (no module)")
    chosen = Kernels.choose("auto", torch.float32, torch.device("cpu"))
    assert chosen.own is None
    assert chosen.name == "torch (our own are not built at install (no module))"
    with pytest.raises(InvalidInput, match="C compiler"):
        Kernels.choose("own", torch.float32, torch.device("cpu"))


def test_large_experts_of_many_tokens_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 none where the processor multiplies it itself, but in tiles: then those of olmoe-mini do, and those
    in four bits."""
    small, mini, huge = (
        ExpertShape((1, 1, hidden, inner, 0, 0, -1, 0, -1), torch.bfloat16, Gate(0))
        for hidden, inner in ((256, 128), (1024, 512), (4096, 1024))
    )
    wide, pairs = (names & {*instruction_sets()} != set() for names in (WIDE, {PAIRS}))
    four = replace(huge, scales=Scales(64, 128, (1, 4, 1, 32), 1024))
    for tiles in (False, True):
        monkeypatch.setattr(products.compiled, "tiles", lambda there=tiles: there)
        kernels = Kernels.choose("own", torch.bfloat16, torch.device("cpu"))
        alone = pairs and not tiles
        found = [kernels.takes_many(shape) for shape in (small, mini, huge, four)]
        assert found == [wide, wide and not tiles, alone, alone]
        assert not kernels.takes_many(replace(small, across=True))
    assert not Kernels(None, "torch").takes_many(small)


def test_many_rows_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels.choose("own", torch.float32, torch.device("cpu"))
    seen: list[int] = []
    monkeypatch.setattr(kernels.own, "linear", lambda x, *_: seen.append(len(x)) or x)
    for rows in (1, FEW[torch.float32], FEW[torch.float32] + 1):
        kernels.linear(torch.randn(rows, 8), torch.randn(8, 8))
    assert seen == [1, FEW[torch.float32]]
