from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import CorruptStore, MismatchError
from store.packing import (
    FORMAT_NAME,
    exemplar_digest,
    pack_arrays,
    pack_selection,
    pack_vector,
    unpack_arrays,
    unpack_selection,
    unpack_vector,
)
from store.records import Exemplar, Selection

DTYPES = st.sampled_from(["f4", "f8", "i4", "i8", "u1", "?"])
KINDS = st.dictionaries(
    st.text("abc_.x/", min_size=1) | st.sampled_from(["file", "format", "allow_pickle", "array.x"]),
    st.tuples(st.lists(st.integers(0, 5), max_size=3), DTYPES),
    max_size=4,
)


@settings(deadline=None, max_examples=50)
@given(kinds=KINDS, seed=st.integers(0, 2**32 - 1))
def test_arrays_come_back_as_they_were(kinds: dict[str, tuple[list[int], str]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays = {name: (rng.normal(size=shape) * 1e3).astype(dtype) for name, (shape, dtype) in kinds.items()}
    back = unpack_arrays(pack_arrays(arrays), "p")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape)
        assert back[name].tobytes() == array.tobytes()


def test_the_same_arrays_give_the_same_bytes_in_any_order() -> None:
    a, b = np.arange(6.0).reshape(2, 3), np.arange(3)
    assert pack_arrays({"a": a, "b": b}) == pack_arrays({"b": b, "a": np.asfortranarray(a)})


def test_every_damaged_byte_that_matters_is_noticed() -> None:
    arrays = {"gate": np.random.default_rng(0).random((4, 8))}
    blob = pack_arrays(arrays)
    noticed = 0
    for at in range(len(blob)):
        damaged = blob[:at] + bytes([blob[at] ^ 0x55]) + blob[at + 1 :]
        try:
            back = unpack_arrays(damaged, "p")
        except (CorruptStore, MismatchError):
            noticed += 1
        else:  # a byte of the archive's own notes, such as its dates: the numbers are still right
            assert all(np.array_equal(back[name], array) for name, array in arrays.items() if name in back)
    assert noticed > len(blob) / 2


@pytest.mark.parametrize("cut", [0, 1, 10, 100, -1])
def test_a_truncated_blob_is_noticed(cut: int) -> None:
    with pytest.raises(CorruptStore, match=r"statistics of profile p are damaged.*profile it again"):
        unpack_arrays(pack_arrays({"gate": np.ones((4, 4))})[:cut], "profile p")


def test_a_pickle_is_never_loaded() -> None:
    stored = io.BytesIO()
    np.savez_compressed(stored, gate=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(CorruptStore, match="pickle"):
        unpack_arrays(stored.getvalue(), "p")
    with pytest.raises(CorruptStore):
        unpack_arrays(pickle.dumps({"gate": 1}), "p")


def test_objects_are_not_packed() -> None:
    with pytest.raises(AssertionError, match="numbers"):
        pack_arrays({"gate": np.array([None])})


def test_a_blob_of_a_newer_format_is_refused_with_the_fix() -> None:
    stored = io.BytesIO()
    np.savez_compressed(stored, **{FORMAT_NAME: np.int64(2)}, gate=np.ones(3))
    with pytest.raises(MismatchError, match=r"in format 2, this moepager reads 1\. Upgrade"):
        unpack_arrays(stored.getvalue(), "p")


SELECTIONS = st.lists(st.sets(st.integers(0, 300)), max_size=6).map(Selection.of)


@given(SELECTIONS)
def test_a_selection_comes_back_as_it_was(selection: Selection) -> None:
    width, bitmap = pack_selection(selection)
    assert len(bitmap) == len(selection.experts) * ((width + 7) // 8)
    assert unpack_selection(len(selection.experts), width, bitmap, "s") == selection


def test_a_damaged_bitmap_is_noticed() -> None:
    width, bitmap = pack_selection(Selection.whole(3, 64))
    with pytest.raises(CorruptStore, match=r"selection s is damaged.*24 bytes, 23 are stored"):
        unpack_selection(3, width, bitmap[:-1], "s")


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9))
def test_a_vector_comes_back_as_it_was(numbers: list[float]) -> None:
    vector = np.array(numbers, np.float32)
    assert unpack_vector(pack_vector(vector), "v").tobytes() == vector.tobytes()


@pytest.mark.parametrize("blob", [b"", b"123", b"12345"])
def test_a_damaged_vector_is_noticed(blob: bytes) -> None:
    with pytest.raises(CorruptStore, match="vector of 'q' is damaged"):
        unpack_vector(blob, "'q'")


def test_the_digest_of_an_exemplar_covers_all_its_fields() -> None:
    vector = np.array([1, 0], np.float32)
    others = [
        Exemplar("task", "text", vector, "embedder"),
        Exemplar("tas", "ktext", vector, "embedder"),
        Exemplar("task", "tex", vector, "tembedder"),
        Exemplar("task", "text", vector[::-1], "embedder"),
        Exemplar("task", "text", vector, "other"),
    ]
    assert len({exemplar_digest(exemplar) for exemplar in others}) == len(others)
    assert exemplar_digest(others[0]) == exemplar_digest(Exemplar("task", "text", vector.copy(), "embedder"))
