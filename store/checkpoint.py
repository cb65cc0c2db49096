"""The map of an unmodified checkpoint: which tensor lies where. Reads headers, never tensor data, never a pickle."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from store.errors import CheckpointError
from store.fingerprint import Fingerprint, fingerprint
from store.identity import Identity
from store.papers import Papers, read_object
from store.shard import Shard, TensorSpan, read_shard

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})


@dataclass(frozen=True)
class CheckpointMap:
    """Every tensor of a model folder by its hub name. Opening reads headers; `fingerprint` samples the weights."""

    folder: Path
    papers: Papers
    shards: tuple[Shard, ...]  # those that hold a tensor, in order of their paths
    tensors: Mapping[str, TensorSpan]

    @classmethod
    def open(cls, folder: str | Path) -> CheckpointMap:
        """Raises CheckpointError, with the fix, for a folder that can't be mapped to the byte."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                f"There is no model folder {folder}. Give a folder with config.json and safetensors files."
            )
        papers = Papers.read(folder)
        single = (folder / SINGLE).is_file()
        tensors, shards = _read_single(folder / SINGLE) if single else _read_indexed(folder)
        used = {span.file for span in tensors.values()}
        kept = tuple(sorted((shard for shard in shards if shard.file in used), key=lambda shard: shard.file))
        return cls(folder, papers, kept, MappingProxyType(tensors))

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        return self.papers.config

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(shard.file for shard in self.shards)

    @property
    def identities(self) -> Mapping[Path, Identity]:
        """Of every file, as it was when its header was read: the map says nothing of any other state."""
        return {shard.file: shard.identity for shard in self.shards}

    def check(self) -> None:
        """Raises ShardChanged or PapersChanged, or CheckpointError for a shard that is gone, unless all files are still
        as they were mapped.

        After reading them by their paths: then what was read is what the map says.
        """
        self.papers.check()
        for shard in self.shards:
            shard.identity.check_path(shard.file)

    @property
    def weight_bytes(self) -> int:
        """The bytes of all tensors, headers not counted."""
        return sum(span.nbytes for span in self.tensors.values())

    def fingerprint(self) -> Fingerprint:
        """Hashes config, weights and tokenizer on first call; `store.fingerprint` says what exactly is covered."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> Fingerprint:
        return fingerprint(self.papers, self.shards)


Found = tuple[Mapping[str, TensorSpan], Collection[Shard]]


def _read_single(file: Path) -> Found:
    shard = read_shard(file)
    return shard.tensors, [shard]


def _read_indexed(folder: Path) -> Found:
    if not (folder / INDEX).is_file():
        raise CheckpointError(_why_no_weights(folder))
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX} has no weight_map from tensor to file. Download the file again.")
    shards = {name: read_shard(_shard_file(folder, name)) for name in sorted(set(map(str, weight_map.values())))}
    for tensor, shard in weight_map.items():
        if tensor not in shards[str(shard)].tensors:
            raise CheckpointError(
                f"{INDEX} says that {tensor!r} is in {shard}, but that file does not hold it. "
                "Index and shards are of different checkpoints: download both again."
            )
    return {tensor: shards[str(shard)].tensors[tensor] for tensor, shard in weight_map.items()}, shards.values()


def _shard_file(folder: Path, name: str) -> Path:
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{folder / INDEX} names the shard {name!r}; a shard is a .safetensors file beside the index."
        )
    if not (folder / name).is_file():
        raise CheckpointError(
            f"The shard {name} is missing in {folder}, though {INDEX} lists it. Download the missing file."
        )
    return folder / name


def _why_no_weights(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    pickles = [name for name in names if Path(name).suffix in PICKLES]
    if pickles:
        return (
            f"{folder} has its weights as pickles only ({', '.join(pickles[:3])}), and a pickle can run code. "
            "Use a safetensors version of the model, or convert it where you trust it: model.save_pretrained(folder)."
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f" It has {', '.join(others[:3])}, under names that are not the hub's." if others else ""
    return (
        f"{folder} has neither {SINGLE} nor {INDEX}.{found} Download the weights, or rename a single file to {SINGLE}."
    )
