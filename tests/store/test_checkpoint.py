from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from store.checkpoint import CheckpointMap
from store.errors import CheckpointError

WriteModel = Callable[..., Path]

TENSORS = {f"layer.{n}": np.full((n + 1, 3), n, np.float32) for n in range(5)}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_every_tensor_is_found_in_one_file_or_in_shards(write_model: WriteModel, shards: int) -> None:
    checkpoint = CheckpointMap.open(write_model(TENSORS, shards=shards))
    assert set(checkpoint.tensors) == set(TENSORS)
    assert len(checkpoint.files) == shards
    assert checkpoint.weight_bytes == sum(array.nbytes for array in TENSORS.values())
    for name, array in TENSORS.items():
        span = checkpoint.tensors[name]
        with span.file.open("rb") as stream:
            stream.seek(span.offset)
            assert stream.read(span.nbytes) == array.tobytes()
        assert (span.name, span.dtype, span.shape) == (name, "F32", array.shape)


def test_a_folder_given_as_text_opens_too(write_model: WriteModel) -> None:
    assert CheckpointMap.open(str(write_model(TENSORS))).config == {"model_type": "test"}


def test_the_map_can_not_be_changed(write_model: WriteModel) -> None:
    checkpoint = CheckpointMap.open(write_model(TENSORS))
    with pytest.raises(TypeError):
        checkpoint.config["model_type"] = "other"  # type: ignore[index]
    with pytest.raises(TypeError):
        checkpoint.tensors["new"] = checkpoint.tensors["layer.0"]  # type: ignore[index]


def test_shards_behind_links_are_read_where_they_lie(write_model: WriteModel, tmp_path: Path) -> None:
    folder = write_model(TENSORS)
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)  # what the hub's cache looks like
    assert set(CheckpointMap.open(folder).tensors) == set(TENSORS)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model folder .*gone"):
        CheckpointMap.open(tmp_path / "gone")


def test_a_folder_without_config_is_refused(write_model: WriteModel) -> None:
    folder = write_model(TENSORS)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        CheckpointMap.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\ud800"])
def test_a_config_that_is_no_object_is_refused(write_model: WriteModel, text: str) -> None:
    folder = write_model(TENSORS)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        CheckpointMap.open(folder)


class Bomb:
    """Unpickling it would make the file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_unpickled(write_model: WriteModel, tmp_path: Path, name: str) -> None:
    folder = write_model(TENSORS)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match=rf"pickles only \({name}\).*save_pretrained"):
        CheckpointMap.open(folder)
    assert not (tmp_path / "exploded").exists()


def test_pickles_beside_safetensors_are_of_no_interest(write_model: WriteModel) -> None:
    folder = write_model(TENSORS)
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert set(CheckpointMap.open(folder).tensors) == set(TENSORS)


def test_a_folder_without_weights_says_what_it_has_instead(write_model: WriteModel) -> None:
    folder = write_model(TENSORS)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"It has weights\.safetensors.*rename"):
        CheckpointMap.open(folder)


def test_a_missing_shard_is_named(write_model: WriteModel) -> None:
    folder = write_model(TENSORS, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        CheckpointMap.open(folder)


def test_a_truncated_shard_is_named(write_model: WriteModel) -> None:
    folder = write_model(TENSORS, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is truncated.*5 missing"):
        CheckpointMap.open(folder)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_a_tensor_that_its_shard_does_not_hold_is_named(write_model: WriteModel) -> None:
    folder = write_model(TENSORS, shards=2)
    change_index(folder, lambda names: names.update({"layer.9": "model-00001-of-00002.safetensors"}))
    with pytest.raises(CheckpointError, match=r"'layer\.9' is in model-00001-of-00002\.safetensors, but"):
        CheckpointMap.open(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "model.bin", "", "a/b.safetensors"])
def test_an_index_may_name_only_safetensors_files_beside_it(write_model: WriteModel, shard: str) -> None:
    folder = write_model(TENSORS, shards=2)
    change_index(folder, lambda names: names.update({"layer.0": shard}))
    with pytest.raises(CheckpointError, match="beside the index"):
        CheckpointMap.open(folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "[]"])
def test_an_index_without_a_weight_map_is_refused(write_model: WriteModel, index: str) -> None:
    folder = write_model(TENSORS, shards=2)
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match="index"):
        CheckpointMap.open(folder)


def test_opening_reads_headers_only(write_model: WriteModel) -> None:
    folder = write_model({"a": np.zeros(4, np.float32)})
    file = folder / "model.safetensors"
    header = (
        file.read_bytes()[:-16]
        .replace(b'"shape": [4]', b'"shape": [1000000000]')
        .replace(b"[0, 16]", b"[0, 4000000000]")
    )
    text = header[8:]
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(len(text) + 8 + 4_000_000_000)  # sparse: reading it all would take seconds
    assert CheckpointMap.open(folder).weight_bytes == 4_000_000_000
