"""A new model folder in hub layout, written whole or not at all: everything goes into one beside it that gets its name
when all of it is there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from store.checkpoint import CheckpointMap
from store.errors import BudgetError, Conflict
from store.experts import ExpertMap
from store.sizes import show_bytes

SHARD_BYTES = 1 << 30  # of dense tensors
CARD, INDEX = "pack.json", "model.safetensors.index.json"
LEFT_BEHIND = frozenset({"config.json", INDEX, CARD, "README.md"})
COPIED = ("*.json", "*.jinja", "*.txt", "*.model")


def refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise Conflict(f"{folder} exists. A pack is never written over anything: choose another folder, or remove it.")


@contextmanager
def written_whole(folder: Path, source: CheckpointMap, config: dict[str, Any]) -> Iterator[Path]:
    """Where to write the weights, beside `config` and what goes with a model besides; it is `folder` once this ends
    well. Raises BudgetError where the disk has no room, and leaves nothing then."""
    made = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        made.mkdir(parents=True)
        _check_room(made, source.weight_bytes)
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for pattern in COPIED:
            for file in Path(source.folder).glob(pattern):
                if file.name not in LEFT_BEHIND:
                    shutil.copyfile(file, made / file.name)
        yield made
        made.rename(folder)
    except OSError as error:
        raise BudgetError(
            f"The pack could not be written to {folder}: {error.strerror or error}. Nothing is left of it. Make room, "
            "or choose a folder on another disk."
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _check_room(folder: Path, size: int) -> None:
    """Before anything is read: a pack takes at most what the model takes."""
    free = shutil.disk_usage(folder).free
    if free < size // 16:  # the smallest pack worth the name; what is really too little, the writing says
        raise BudgetError(f"{folder.parent} has {show_bytes(free)} free; the model has {show_bytes(size)}. Make room.")


class Shards:
    """Files of tensors, numbered as they come, and at last the index that names them all."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._where, self._size = folder, dict[str, int](), 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        number = len(set(self._where.values())) + 1
        self._where |= dict.fromkeys(tensors, number)
        self._size += sum(tensor.nbytes for tensor in tensors.values())
        with self._file(number).open("wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        numbers = sorted(set(self._where.values()))
        names = {number: f"model-{number:05d}-of-{len(numbers):05d}.safetensors" for number in numbers}
        for number, name in names.items():
            self._file(number).rename(self._folder / name)
        where = {tensor: names[number] for tensor, number in sorted(self._where.items())}
        index = {"metadata": {"total_size": self._size}, "weight_map": where}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file(self, number: int) -> Path:
        return self._folder / f"part-{number}"


def dense_tensors(source: CheckpointMap, experts: ExpertMap) -> Iterator[dict[str, Tensor]]:
    """What every token needs, and prediction heads left out, in parts of bearable size."""
    part: dict[str, Tensor] = {}
    for name in experts.dense:
        span = source.tensors[name]
        if part and sum(tensor.nbytes for tensor in part.values()) + span.nbytes > SHARD_BYTES:
            yield part
            part = {}
        part[name] = tensor_of(source, name)
    if part:
        yield part


def tensor_of(source: CheckpointMap, name: str) -> Tensor:
    """A tensor of the checkpoint as it is stored."""
    with safe_open(source.tensors[name].file, framework="pt") as file:
        found: Tensor = file.get_tensor(name)
        return found


def slices_of(source: CheckpointMap, name: str) -> Iterator[Tensor]:
    """The same, one slice of its leading dimension at a time."""
    with safe_open(source.tensors[name].file, framework="pt") as file:
        whole = file.get_slice(name)
        for at in range(source.tensors[name].shape[0]):
            yield whole[at]
