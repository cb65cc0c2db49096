"""Calibration and evaluation text: reads JSONL, names the line of whatever is wrong, and hashes items by content.

An item is `{"prompt"}`, `{"prompt", "response"}` or `{"messages": [{"role", "content"}, ...]}`; other keys are the
owner's own notes. Knows no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from store.errors import InvalidInput

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Item:
    """One query and, where it is known, its answer. `history` holds the messages before the last user message."""

    prompt: str
    response: str | None = None
    history: tuple[Message, ...] = ()
    line: int = 0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation up to the point where the model has to answer."""
        return (*self.history, Message("user", self.prompt))

    @property
    def content_hash(self) -> str:
        """Names the query whatever its spacing and answer: calibration that saw the query saw the item."""
        return _digest(f"{role}\x1f{_normalised(content)}" for role, content in self.messages)


@dataclass(frozen=True, slots=True)
class Duplicate:
    line: int
    first_line: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Distinct items in the order of the file; repeated ones are left out and named in `duplicates`."""

    items: tuple[Item, ...]
    source: str = "memory"
    duplicates: tuple[Duplicate, ...] = ()

    @property
    def content_hash(self) -> str:
        """Names queries and answers exactly, in order: the same hash means the same calibration."""
        return _digest(json.dumps([item.messages, item.response], ensure_ascii=False) for item in self.items)

    @property
    def item_hashes(self) -> frozenset[str]:
        return frozenset(item.content_hash for item in self.items)


def read_corpus(path: Path) -> Corpus:
    """The items of a JSONL file. Raises InvalidInput that names the file and line."""
    if not path.is_file():
        found = f"{path} is a folder" if path.is_dir() else f"There is no file {path}"
        raise InvalidInput(f'{found}. Give a JSONL file, one {{"prompt": ...}} a line.', param="calibration")
    items = [_parse(raw, path, line) for line, raw in enumerate(path.read_bytes().split(b"\n"), 1) if raw.strip()]
    return gather(items, source=str(path))


def read_items(path: Path) -> list[Item]:
    return list(read_corpus(path).items)


def gather(items: Sequence[Item], source: str = "memory") -> Corpus:
    """A corpus of the distinct items. Raises InvalidInput if there is none."""
    seen: dict[tuple[str, str | None], int] = {}
    distinct: list[Item] = []
    duplicates: list[Duplicate] = []
    for item in items:
        key = (item.content_hash, None if item.response is None else _normalised(item.response))
        if key in seen:
            duplicates.append(Duplicate(item.line, seen[key]))
            continue
        seen[key] = item.line
        distinct.append(item)
    if not distinct:
        raise InvalidInput(f'{source} holds no items. Give at least one line such as {{"prompt": "..."}}.')
    return Corpus(tuple(distinct), source, tuple(duplicates))


def refuse_overlap(calibration: Corpus, evaluation: Corpus) -> None:
    """Evidence comes from queries that the calibration has not seen. Raises InvalidInput naming the shared lines."""
    seen = {item.content_hash: item.line for item in calibration.items}
    shared = [(item.line, seen[item.content_hash]) for item in evaluation.items if item.content_hash in seen]
    if shared:
        first = ", ".join(f"line {here} repeats calibration line {there}" for here, there in shared[:3])
        raise InvalidInput(
            f"{len(shared)} of {len(evaluation.items)} items of {evaluation.source} are calibration items of "
            f"{calibration.source} too: {first}. Remove them from one of the two files.",
            param="eval",
        )


def _parse(raw: bytes, path: Path, line: int) -> Item:
    where = f"{path}, line {line}"
    try:
        record = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{where}: not UTF-8 ({error.reason} at byte {error.start}). Save the file as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"{where}: not JSON ({error.msg} at column {error.colno}). Give one JSON object a line."
        ) from error
    if not isinstance(record, dict):
        raise InvalidInput(f"{where}: wanted a JSON object, got {type(record).__name__}.")
    if ("prompt" in record) == ("messages" in record):
        raise InvalidInput(f"{where}: wanted exactly one of the keys `prompt` and `messages`, got {sorted(record)}.")
    return _from_messages(record, where, line) if "messages" in record else _from_prompt(record, where, line)


def _from_prompt(record: dict[str, Any], where: str, line: int) -> Item:
    response = record.get("response")
    return Item(
        prompt=_text(record["prompt"], "prompt", where),
        response=None if response is None else _text(response, "response", where),
        line=line,
    )


def _from_messages(record: dict[str, Any], where: str, line: int) -> Item:
    raw = record["messages"]
    if "response" in record:
        raise InvalidInput(
            f"{where}: `messages` carry their own answer as a last assistant message; remove `response`."
        )
    if not isinstance(raw, list) or not raw or not all(isinstance(message, dict) for message in raw):
        raise InvalidInput(f"{where}: `messages` must be a list of objects with `role` and `content`.")
    messages = [_message(message, where) for message in raw]
    response = messages.pop().content if messages[-1].role == "assistant" else None
    if not messages or messages[-1].role != "user":
        raise InvalidInput(f"{where}: the last message before the answer must come from the user.")
    return Item(messages[-1].content, response, tuple(messages[:-1]), line)


def _message(raw: dict[str, Any], where: str) -> Message:
    if raw.get("role") not in ROLES:
        raise InvalidInput(f"{where}: a message's `role` must be one of {', '.join(ROLES)}, got {raw.get('role')!r}.")
    return Message(raw["role"], _text(raw.get("content"), "content", where))


def _text(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidInput(f"{where}: `{key}` must be a text, got {type(value).__name__}.")
    if not value.strip():
        raise InvalidInput(f"{where}: `{key}` is empty. Give it a text or remove the line.")
    return value


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _digest(parts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\x1e")
    return digest.hexdigest()[:32]
