"""Running states of rows: random joining, leaving, standing still and failing against plain lists of what each row has
been through."""

from __future__ import annotations

import random

import pytest
import torch
from leaving import some_stay
from torch import Tensor

from engine.cache_shape import CacheShape, StateShape
from engine.kvcache import KvCache, KvPool

ROWS, CONTEXT, SEEN = 5, 400, 3
RUNNING = (StateShape("conv", 0, (2, SEEN), torch.float32), StateShape("recurrent", 0, (2, 2), torch.float64))
SHAPES = [
    CacheShape(states=RUNNING),
    CacheShape(((1, 1), (1, 1))),
    CacheShape(((1, 1), (1, 1)), states=(StateShape("conv", 1, (2, SEEN), torch.float32),)),
]
MODULUS = 10007


def _pool() -> KvPool:
    return KvPool(SHAPES, ROWS, CONTEXT, torch.float32, torch.device("cpu"))


def _send(cache: KvCache, values: list[list[float]], still: frozenset[int] = frozenset()) -> list[Tensor]:
    """A pass as models make it: convolutions in place for one token, what is left of a state handed over. What both
    convolutions saw, [B, new or more], and the state, [B]."""
    mask = torch.ones(len(values), len(values[0]), dtype=torch.long)
    mask[list(still)] = 0
    with cache.passing(mask):
        return _pass(cache, torch.tensor(values))


def _pass(cache: KvCache, x: Tensor) -> list[Tensor]:
    rows, new = x.shape
    found = []
    state = cache.get_recurrent_state(0)
    for layer, at in ((0, 0), (2, 1)):
        before = cache.get_conv_state(layer, at)
        wide = x[:, None].expand(-1, 2, -1)
        if before is not None and new == 1:
            before.copy_(torch.cat([before[..., 1:], wide], -1))
            found.append(before[:, 0])
        else:
            found.append(cache.update_conv_state(wide, layer, at, conv_kernel_size=SEEN)[:, 0])
    for layer in (1, 2):
        cache.update(x[:, None, :, None], x[:, None, :, None], layer)
    state = torch.zeros(rows, 2, 2, dtype=torch.float64) if state is None else state
    for column in x.double().unbind(1):
        state = (3 * state + column[:, None, None]) % MODULUS
    cache.update_recurrent_state(state, 0)
    return [*found, state[:, 0, 0]]


def _fail(cache: KvCache, rows: int) -> None:
    """A pass of one token that ends half-way."""
    with cache.passing(torch.ones(rows, 1)):
        _pass(cache, torch.full((rows, 1), 77.0))
        raise OSError("half-way")


def _assert_saw(found: list[Tensor], rows: list[list[float]], moved: frozenset[int]) -> None:
    """Each of the rows `moved` is found to have been through what `rows` says."""
    *convolutions, state = found
    for place in moved:
        wanted = 0.0
        for number in rows[place]:
            wanted = (3 * wanted + number) % MODULUS
        assert state[place] == wanted
        last = ([0.0] * SEEN + rows[place])[-SEEN:]
        for seen in convolutions:
            assert seen[place, -SEEN:].tolist() == last


@pytest.mark.parametrize("seed", range(30))
def test_rows_go_on_from_where_each_of_them_is(seed: int) -> None:
    rng, fresh = random.Random(seed), iter(range(1, 10**6))
    pool = _pool()
    cache, rows = pool.window(0, 0), [[0.0] for _ in range(0)]
    joining: tuple[KvCache, list[list[float]]] | None = None
    for _ in range(150):
        match rng.choice(("append", "append", "fail", "leave", "form", "go on", "join")):
            case "append" if rows:
                new = [[float(next(fresh))] for _ in rows]
                still = frozenset(place for place in range(len(rows)) if rng.random() < 0.2)
                moved = frozenset(range(len(rows))) - still
                found = _send(cache, new, still)
                rows = [row + new[place] if place in moved else row for place, row in enumerate(rows)]
                _assert_saw(found, rows, moved)
            case "fail" if rows:
                length = cache.length
                with pytest.raises(OSError, match="half-way"):
                    _fail(cache, len(rows))
                cache.rewind(length)
            case "leave" if rows:
                order = some_stay(len(rows), rng)
                cache.keep(order)
                rows = [rows[place] for place in order]
            case "form" if joining is None and len(rows) < ROWS:
                count, width = rng.randint(1, ROWS - len(rows)), rng.randint(1, 6)
                own = [[float(next(fresh)) for _ in range(width)] for _ in range(count)]
                joining = pool.window(len(rows), count), own
                _assert_saw(_send(joining[0], own), own, frozenset(range(count)))
            case "go on" if joining is not None:
                joined, own = joining
                more = [[float(next(fresh)) for _ in range(3)] for _ in own]
                own = [[*one, *new] for one, new in zip(own, more, strict=True)]
                _assert_saw(_send(joined, more), own, frozenset(range(len(own))))
                joining = joined, own
            case "join" if joining is not None:
                joined, own = joining
                if (wider := joined.length - cache.length) > 0:
                    cache.shift(-wider)
                cache.absorb(joined)
                rows, joining = rows + own, None
        assert cache.rows == len(rows)


def test_a_row_that_is_forked_goes_on_in_each_copy_by_itself() -> None:
    cache = _pool().window(1, 4)
    cache.keep([0, 1])
    _send(cache, [[1.0, 2.0], [5.0, 6.0]])
    cache.fork([1, 0])
    rows = [[1.0, 2, 3], [5.0, 6, 7], [5.0, 6, 8], [1.0, 2, 4]]
    _assert_saw(_send(cache, [[3.0], [7.0], [8.0], [4.0]]), rows, frozenset(range(4)))


def test_nothing_of_an_earlier_request_is_left() -> None:
    pool = _pool()
    _send(pool.window(0, ROWS), [[9.0, 9.0, float("inf")]] * ROWS)
    cache = pool.window(1, 2)
    assert cache.get_conv_state(0) is None
    assert cache.get_recurrent_state(0) is None
    _assert_saw(_send(cache, [[1.0], [2.0]]), [[1.0], [2.0]], frozenset({0, 1}))


def test_a_row_whose_prompt_begins_in_a_later_chunk_begins_with_nothing() -> None:
    cache = _pool().window(0, 2)
    _send(cache, [[4.0], [0.0]], still=frozenset({1}))
    _assert_saw(_send(cache, [[5.0], [6.0]]), [[4.0, 5.0], [6.0]], frozenset({0, 1}))


def test_bytes_are_counted_those_of_states_twice() -> None:
    per_row = 2 * SEEN * 4 + 4 * 8 + 2 * SEEN * 4
    assert _pool().nbytes == ROWS * (2 * per_row + 2 * CONTEXT * 2 * 4)
