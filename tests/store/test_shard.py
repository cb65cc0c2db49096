from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from store.errors import CheckpointError
from store.shard import MAX_HEADER, read_shard

Raw = Callable[[dict[str, object] | bytes, bytes], bytes]

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
DTYPES = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_])
ARRAYS = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, DTYPES), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(kinds=ARRAYS, seed=st.integers(0, 2**32 - 1))
def test_spans_cut_the_very_bytes_that_the_reference_library_wrote(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, tuple[tuple[int, ...], type]], seed: int
) -> None:
    kinds.pop("__metadata__", None)
    rng = np.random.default_rng(seed)
    arrays = {name: rng.integers(0, 100, shape).astype(dtype) for name, (shape, dtype) in kinds.items()}
    file = tmp_path_factory.mktemp("shard") / "x.safetensors"
    file.write_bytes(save(arrays))
    spans = read_shard(file).tensors
    assert spans.keys() == arrays.keys()
    content = file.read_bytes()
    for name, array in arrays.items():
        span = spans[name]
        assert span.shape == array.shape
        assert content[span.offset : span.offset + span.nbytes] == array.tobytes()


def test_four_bit_tensors_are_counted_in_bits(tmp_path: Path, raw: Raw) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw({"a": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]}}, bytes(6)))
    assert read_shard(file).tensors["a"].nbytes == 6


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        ({"a": entry(0, 8)}, bytes(7), "truncated.*1 missing"),
        ({"a": entry(0, 8)}, bytes(9), "1 bytes belong to nothing"),
        ({"a": entry(0, 4), "b": entry(3, 8)}, bytes(8), "'b'.*overlaps"),
        ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(8), "overlaps"),
        ({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8), "'b'.*leaves a gap"),
        ({"a": entry(1, 4)}, bytes(4), "leaves a gap"),
        ({"a": entry(0, 8, shape=[3])}, bytes(8), "3 bytes.*0 to 8"),
        ({"a": entry(0, 8, shape=[3], dtype="F16")}, bytes(8), "6 bytes"),
        ({"a": entry(4, 0, shape=[4])}, bytes(4), "bytes 4 to 0"),
        ({"a": entry(-4, 0, shape=[4])}, bytes(4), "bytes -4 to 0"),
        ({"a": entry(0, 4, dtype="Q4_K")}, bytes(4), "dtype 'Q4_K'.*BF16"),
        ({"a": entry(0, 1, shape=[3], dtype="F4")}, bytes(1), "F4"),
        ({"a": entry(0, 4, shape=[-2, -2])}, bytes(4), "needs dtype, shape"),
        ({"a": {"dtype": "U8", "shape": [4]}}, bytes(4), "'a' needs dtype, shape and data_offsets"),
        ({"a": 3}, b"", "'a' needs"),
        (b"[]", b"", "not a JSON object"),
        (b'{"a": ', b"", "corrupt"),
        (b"\xff\xfe\xff", b"", "corrupt"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', b"", "'a' is listed twice"),
        (b"[" * 100_000, b"", "corrupt"),
    ],
)
def test_a_header_that_does_not_add_up_is_refused(
    tmp_path: Path, raw: Raw, header: dict[str, object] | bytes, data: bytes, said: str
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(raw(header, data))
    with pytest.raises(CheckpointError, match=rf"(?s){said}") as caught:
        read_shard(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "truncated: 0 bytes"),
        (b"\x02\x00\x00", "truncated: 3 bytes"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: 10 bytes, but its header alone takes 108"),
        (
            (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
            "claims a header of 100,000,001 bytes, the limit is 100,000,000",
        ),
        ((2**63).to_bytes(8, "little") + b"{}", "no safetensors file"),
        ((0).to_bytes(8, "little"), "no safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    ],
)
def test_a_file_that_can_be_no_shard_is_refused_before_its_header_is_read(
    tmp_path: Path, content: bytes, said: str
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        read_shard(file)


def test_every_truncation_of_a_good_file_is_refused(tmp_path: Path) -> None:
    whole = save({"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.int8)})
    file = tmp_path / "x.safetensors"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_shard(file)


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({"a": np.zeros(1, np.int8)}, metadata={"format": "pt"}))
    assert "__metadata__" in json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    assert list(read_shard(file).tensors) == ["a"]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        read_shard(tmp_path / "gone.safetensors")
