"""The KV cache: random joining, leaving and shifting against plain lists of what each row holds."""

from __future__ import annotations

import random

import pytest
import torch
from leaving import some_stay
from torch import Tensor

from engine.cache_shape import CacheShape
from engine.kvcache import KvCache, KvPool
from store.errors import Busy

ROWS, CONTEXT = 5, 12
INDEX = 5
SHAPES = [CacheShape(((2, 3), (1, 4))), CacheShape(), CacheShape(((2, 3), (1, 4)), index=INDEX)]
GROWN = [0, 2]  # the layers that have columns


def _pool() -> KvPool:
    return KvPool(SHAPES, ROWS, CONTEXT, torch.float32, torch.device("cpu"))


def _states(shape: tuple[int, int], values: list[list[float]]) -> Tensor:
    """[B, N, new, width], every number of a column the same."""
    heads, width = shape
    return torch.tensor(values)[:, None, :, None].expand(-1, heads, -1, width)


def _append(cache: KvCache, values: list[list[float]]) -> list[tuple[Tensor, ...]]:
    """Send the columns through as the model does, layer by layer (the last gets the negatives, and has an indexer,
    which is asked before or after); what it is given."""
    given: list[tuple[Tensor, ...]] = []
    for layer in GROWN:
        key, value = SHAPES[layer].kv or ((0, 0), (0, 0))
        signed = [[-number if layer else number for number in row] for row in values]
        first = bool(layer) and values[0][0] % 2 == 0
        index = [cache.update_indexer(_states((1, INDEX), signed)[:, 0], layer)] if first else []
        columns = cache.update(_states(key, signed), _states(value, signed), layer)
        if layer and not first:
            index = [cache.update_indexer(_states((1, INDEX), signed)[:, 0], layer)]
        given.append((*columns, *(keys[:, None] for keys in index)))
    return given


def _assert_holds(given: list[tuple[Tensor, ...]], rows: list[list[float]]) -> None:
    """Each row's newest columns are `rows`; what is left of them is finite."""
    for layer, tensors in enumerate(given):
        for tensor in tensors:
            assert tensor.isfinite().all()
            for place, wanted in enumerate(rows):
                own = tensor[place, :, tensor.shape[2] - len(wanted) :]
                signed = torch.tensor([-number if layer else number for number in wanted])
                assert torch.equal(own, signed[None, :, None].expand_as(own))


def test_a_row_that_is_forked_goes_on_in_each_copy_by_itself() -> None:
    cache = _pool().window(1, 4)
    cache.keep([0, 1])
    _append(cache, [[1.0, 2.0], [5.0, 6.0]])
    cache.fork([1, 0])
    _assert_holds(_append(cache, [[3.0], [7.0], [8.0], [4.0]]), [[1, 2, 3], [5, 6, 7], [5, 6, 8], [1, 2, 4]])
    with pytest.raises(AssertionError):
        cache.fork([0])  # the window has no place left


@pytest.mark.parametrize("seed", range(30))
def test_rows_keep_what_they_hold_whoever_joins_leaves_or_makes_room(seed: int) -> None:
    rng, fresh = random.Random(seed), iter(range(1, 10**6))
    pool = _pool()
    cache, rows = pool.window(0, 0), [[0.0] for _ in range(0)]
    joining: tuple[KvCache, list[list[float]]] | None = None
    for _ in range(200):
        match rng.choice(("append", "leave", "form", "join", "narrow")):
            case "append" if rows:
                if cache.length == CONTEXT:
                    cache.shift(CONTEXT - max(map(len, rows)))
                if cache.length < CONTEXT:
                    new = [[float(next(fresh))] for _ in rows]
                    rows = [[*row, *column] for row, column in zip(rows, new, strict=True)]
                    _assert_holds(_append(cache, new), rows)
            case "leave" if rows:
                order = some_stay(len(rows), rng)
                cache.keep(order)
                rows = [rows[place] for place in order]
            case "form" if joining is None and len(rows) < ROWS:
                count, width = rng.randint(1, ROWS - len(rows)), rng.randint(1, CONTEXT - 1)
                own = [[float(next(fresh)) for _ in range(width)] for _ in range(count)]
                joining = pool.window(len(rows), count), own
                _append(joining[0], own)
            case "join" if joining is not None:
                joined, own = joining
                if (wider := joined.length - cache.length) > 0:
                    cache.shift(-wider)
                cache.absorb(joined)
                rows, joining = rows + own, None
            case "narrow":
                cache.shift(cache.length - max(map(len, rows), default=0))
        assert cache.rows == len(rows)


def test_nothing_of_an_earlier_request_is_left_where_padding_hides_it() -> None:
    pool = _pool()
    _append(pool.window(0, ROWS), [[float("inf")] * CONTEXT] * ROWS)
    cache = pool.window(0, 1)
    _append(cache, [[1.0, 2.0, 3.0, 4.0]])
    short = pool.window(1, 1)
    _append(short, [[5.0]])
    cache.absorb(short)
    _assert_holds(_append(cache, [[6.0], [7.0]]), [[1.0, 2.0, 3.0, 4.0, 6.0], [5.0, 7.0]])
    wide = pool.window(2, 1)
    _append(wide, [[float(n) for n in range(8)]])
    cache.shift(cache.length - wide.length)
    cache.absorb(wide)
    _assert_holds(_append(cache, [[1.0]] * 3), [[6.0, 1.0], [7.0, 1.0], [7.0, 1.0]])


def test_a_row_that_is_pushed_to_the_right_drops_its_last_columns_and_is_clean_on_its_left() -> None:
    cache = _pool().window(1, 2)
    _append(cache, [[5.0, 1.0, 2.0, 7.0], [3.0, 4.0, 5.0, 6.0]])
    cache.push(0, 2)
    given = _append(cache, [[8.0], [9.0]])
    assert not any(tensor[0, :, :2].any() for layer in given for tensor in layer)
    _assert_holds(given, [[5, 1, 8], [3, 4, 5, 6, 9]])


def test_a_pass_that_failed_half_way_is_forgotten() -> None:
    cache = _pool().window(0, 1)
    _append(cache, [[1.0, 2.0]])
    cache.update(_states((2, 3), [[9.0]]), _states((1, 4), [[9.0]]), 0)
    cache.update_indexer(torch.full((1, 1, INDEX), 9.0), 2)
    cache.rewind(2)
    _assert_holds(_append(cache, [[3.0]]), [[1.0, 2.0, 3.0]])


def test_one_batch_at_a_time_has_the_pool() -> None:
    pool = _pool()
    with pool.lend(), pytest.raises(Busy, match="Another batch"), pool.lend():
        pass
    with pool.lend() as lent:
        assert lent is pool
