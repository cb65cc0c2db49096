from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import store.fingerprint
from store.checkpoint import CheckpointMap
from store.fingerprint import Fingerprint

WriteModel = Callable[..., Path]

PARTS = ("config", "weights", "tokenizer")


def taken(folder: Path) -> Fingerprint:
    return CheckpointMap.open(folder).fingerprint()


def changed(before: Fingerprint, after: Fingerprint) -> set[str]:
    assert (before.whole != after.whole) == any(getattr(before, part) != getattr(after, part) for part in PARTS)
    return {part for part in PARTS if getattr(before, part) != getattr(after, part)}


@pytest.fixture
def folder(write_model: WriteModel) -> Path:
    rng = np.random.default_rng(0)
    made = write_model({f"t{n}": rng.random((40, 50), np.float32) for n in range(4)}, {"b": 2, "a": [1, 2]}, shards=2)
    (made / "tokenizer.json").write_text('{"model": {}}')
    return made


def test_a_copy_elsewhere_has_the_same_fingerprint(folder: Path, tmp_path: Path) -> None:
    before = taken(folder)
    assert taken(folder.rename(tmp_path / "elsewhere")) == before
    assert all(len(part) == 64 for part in (before.config, before.weights, before.tokenizer, before.whole))


def test_layout_and_notes_of_the_config_do_not_count(folder: Path) -> None:
    before = taken(folder)
    notes = {"a": [1, 2], "b": 2, "transformers_version": "5.0", "_name_or_path": "/home/me/model"}
    (folder / "config.json").write_text(json.dumps(notes, indent=4))
    assert changed(before, taken(folder)) == set()


def test_a_setting_of_the_config_counts(folder: Path) -> None:
    before = taken(folder)
    (folder / "config.json").write_text('{"b": 2, "a": [2, 1]}')
    assert changed(before, taken(folder)) == {"config"}


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize("at", [-1, -5000, -16000])
def test_any_byte_of_small_weights_counts(folder: Path, shard: int, at: int) -> None:
    before = taken(folder)
    file = folder / f"model-0000{shard}-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    assert changed(before, taken(folder)) == {"weights"}


def test_names_and_shapes_of_tensors_count(write_model: WriteModel) -> None:
    before = taken(write_model({"a": np.zeros((2, 3), np.float32)}))
    assert changed(before, taken(write_model({"b": np.zeros((2, 3), np.float32)}))) == {"weights"}
    assert changed(before, taken(write_model({"a": np.zeros((3, 2), np.float32)}))) == {"weights"}


def test_big_files_are_sampled_at_both_ends_and_evenly_between(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.fingerprint, "WHOLE_FILE", 1000)
    monkeypatch.setattr(store.fingerprint, "BLOCK", 100)
    monkeypatch.setattr(store.fingerprint, "BLOCKS", 5)
    folder = write_model({"a": np.zeros(4000, np.uint8)})
    file = folder / "model.safetensors"
    before, size = taken(folder), file.stat().st_size
    start = size - 4000
    sampled = {(size - 100) * n // 4 + k for n in range(5) for k in range(100)}
    for at in (start, *range(start, size, 97), size - 1):
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
        assert changed(before, taken(folder)) == ({"weights"} if at in sampled else set())
        content[at] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "merges.txt", "special_tokens_map.json"]
)
def test_every_tokenizer_file_counts(folder: Path, name: str) -> None:
    before = taken(folder)
    (folder / name).write_text("x")
    assert changed(before, taken(folder)) == {"tokenizer"}


def test_other_files_do_not_count(folder: Path) -> None:
    before = taken(folder)
    (folder / "README.md").write_text("x")
    (folder / "generation_config.json").write_text("{}")
    assert changed(before, taken(folder)) == set()


def test_text_can_not_move_from_one_tokenizer_file_to_another_unseen(folder: Path) -> None:
    (folder / "merges.txt").write_text("ab")
    (folder / "vocab.json").write_text("c")
    before = taken(folder)
    (folder / "merges.txt").write_text("a")
    (folder / "vocab.json").write_text("bc")
    assert changed(before, taken(folder)) == {"tokenizer"}


def test_it_is_computed_once(folder: Path) -> None:
    checkpoint = CheckpointMap.open(folder)
    before = checkpoint.fingerprint()
    for file in checkpoint.files:
        file.unlink()
    assert checkpoint.fingerprint() == before
