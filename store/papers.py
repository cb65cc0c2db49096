"""The small files of a model folder, which say what its weights mean: its config, what ends an answer, its tokenizer.

They are read once for their meaning, when the folder is mapped, and by other hands (transformers) shortly after; and
they may be changed at any time. So what each said is remembered as a hash, and may be compared with what it says now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from store.errors import CheckpointError, PapersChanged

CONFIG = "config.json"
GENERATION = "generation_config.json"
ENDS = "eos_token_id"  # in both: the tokens that end an answer
TEMPLATES = "additional_chat_templates"  # a folder

# Notes of whoever saved the model: they change with the tool, not with the model.
CONFIG_NOTES = frozenset({"_name_or_path", "transformers_version"})

TOKENIZER_FILES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tekken.json",
        "tiktoken.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)

State = tuple[int, int, int]  # of a file: inode, bytes, nanoseconds since 1970 of its last writing


@dataclass(frozen=True, slots=True)
class Papers:
    """As they were when they were read. Hashes are sha256 in hex."""

    folder: Path
    config: Mapping[str, Any]  # config.json
    meaning: str  # hash of what config and generation config say, without layout and notes
    tokenizer: str  # one hash of all the tokenizer's files
    said: Mapping[str, str]  # a hash for each file, by its name inside the folder

    @classmethod
    def read(cls, folder: Path) -> Papers:
        """Raises CheckpointError for a folder without a config, or one that can't be read."""
        config = _read_config(folder)
        ends = _ends(folder, config)
        whole, said = hashlib.sha256(), {}
        for name, content in _tokenizer_files(folder):
            whole.update(f"{name} {len(content)}\n".encode())
            whole.update(content)
            said[name] = hashlib.sha256(content).hexdigest()
        said[CONFIG], said[GENERATION] = _hash_json(_without_notes(config)), _hash_json(ends)
        meaning = _without_notes(config) | ({GENERATION: ends} if ends != _listed(config.get(ENDS)) else {})
        return cls(folder, MappingProxyType(config), _hash_json(meaning), whole.hexdigest(), MappingProxyType(said))

    def changed(self) -> tuple[str, ...]:
        """The names of the files that say something else now, or that came or went, in order.

        A folder that can't be read any more as a whole is one whose config has changed.
        """
        try:
            now = Papers.read(self.folder).said
        except CheckpointError:
            return (CONFIG,)
        return tuple(name for name in sorted(self.said.keys() | now.keys()) if self.said.get(name) != now.get(name))

    def check(self) -> None:
        """After others have read the files by their paths. Raises PapersChanged, unless they read what this says."""
        if changed := self.changed():
            raise PapersChanged(
                f"{', '.join(changed)} in {self.folder} changed after the model's files were looked at, so what was "
                "read since may be a mixture. Open the model again, once its files are at rest."
            )

    def states(self) -> Mapping[str, State]:
        """Which files are there and how they look from outside: cheap, and another when one of them is written."""
        names = [CONFIG, GENERATION, *sorted(TOKENIZER_FILES)]
        there = [self.folder / name for name in names] + _templates(self.folder)
        return {str(file): state for file in there if (state := _state(file)) is not None}


def _state(file: Path) -> State | None:
    try:
        told = file.stat()
    except OSError:
        return None
    return told.st_ino, told.st_size, told.st_mtime_ns


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} has no config.json, so it is no model folder. Give the folder that holds config.json."
        )
    return read_object(folder / CONFIG)


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file holds none."""
    try:
        value = json.loads(_content(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Can't read {file}: {error}. Download the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{file} must hold a JSON object, it holds a {type(value).__name__}. Download the file again."
        )
    return value


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"Can't read {file}: {error.strerror}. Make the file readable.") from error


def _ends(folder: Path, config: Mapping[str, Any]) -> list[Any]:
    """The tokens that end an answer: generation_config.json may name other ones than config.json."""
    own = read_object(folder / GENERATION).get(ENDS) if (folder / GENERATION).is_file() else None
    return _listed(config.get(ENDS) if own is None else own)


def _listed(ends: object) -> list[Any]:
    return sorted(ends, key=str) if isinstance(ends, list) else [] if ends is None else [ends]


def _tokenizer_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every one that is there, by its name, in order, and its content."""
    files = [file for file in sorted(folder.iterdir()) if file.name in TOKENIZER_FILES and file.is_file()]
    for file in files + _templates(folder):
        yield file.relative_to(folder).as_posix(), _content(file)


def _templates(folder: Path) -> list[Path]:
    """Chat templates beside the usual one, such as one for tools."""
    return sorted(file for file in (folder / TEMPLATES).glob("*.jinja") if file.is_file())


def _without_notes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in CONFIG_NOTES}


def _hash_json(value: object) -> str:
    """With sorted keys, so that layout does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
