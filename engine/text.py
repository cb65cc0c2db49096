"""Text to tokens and back: the model's own tokenizer, chat template, streaming detokenizer, stop strings.

No tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment
from llguidance.hf import from_tokenizer
from transformers import AutoTokenizer

from engine.constraints import Words
from engine.harmony import MARKS, SIGNS, TURN
from engine.thought_form import ThoughtForm, thought_form_of
from engine.tool_form import QUESTION, ToolForm, form_of
from store.errors import CheckpointError, InvalidInput

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
INCOMPLETE = "\ufffd"  # what a tokenizer shows for bytes that are no character yet


class Tokenizer:
    """The tokenizer of a model folder. Safe to use from any thread for encoding and decoding."""

    def __init__(self, folder: Path | str) -> None:
        if not any((Path(folder) / name).is_file() for name in FILES):  # transformers would make up an empty one
            raise CheckpointError(f"{folder} has no usable tokenizer: none of {', '.join(FILES)}.")
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} has no usable tokenizer: {error}. Download the tokenizer files too."
            ) from error
        self.eos: frozenset[int] = _eos_ids(Path(folder), self._tokenizer.eos_token_id)
        self.has_chat_template = bool(getattr(self._tokenizer, "chat_template", None))

    @cached_property
    def words(self) -> Words:
        """The vocabulary as bytes. Made when it is first needed, which takes a second where it is large."""
        try:
            return Words(from_tokenizer(self._tokenizer, eos_token=sorted(self.eos) or None))
        except ValueError as error:
            raise InvalidInput(
                f"This model's tokenizer can't be used for constraints or log-probabilities: {error}."
            ) from None

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token, special ones included."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """With the special tokens that the model expects before plain text; without them for text that continues
        other.
        """
        return tuple(self._tokenizer.encode(text, add_special_tokens=special_tokens))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """Messages in the model's chat template, up to where the assistant begins to answer. `options` are variables of
        the template's own.
        """
        if not self.has_chat_template:
            raise InvalidInput(
                "This model has no chat template, so it can't answer messages. Use plain completion.", param="messages"
            )
        text = self._rendered(messages, tools, True, options)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    @cached_property
    def _template_sources(self) -> tuple[str, ...]:
        template = getattr(self._tokenizer, "chat_template", None)
        return tuple(template.values()) if isinstance(template, dict) else (template or "",)

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """What the chat template reads."""
        parse = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse
        plain = (GENERATION.sub("", source) for source in self._template_sources)  # a tag of transformers' own
        return frozenset[str]().union(*(find_undeclared_variables(parse(source)) for source in plain))

    @cached_property
    def tool_form(self) -> ToolForm | None:
        """How the chat template writes calls of tools; None where it knows no tools or marks calls by special tokens,
        which are no text.
        """
        if "tools" not in self.template_variables:
            return None
        try:
            form = form_of(self._rendered)
        except InvalidInput:
            return None
        return form if form is not None and self._is_text(form.begin + form.middle + form.end) else None

    @cached_property
    def thought_form(self) -> ThoughtForm | None:
        """How the chat template marks thoughts; None where it knows none or marks them by special tokens."""
        form = thought_form_of(self._template_sources)
        return form if form is not None and self._is_text(form.begin + form.end) else None

    @cached_property
    def has_channels(self) -> bool:
        """Whether the model answers in channels (engine/harmony.py), by its chat template and its vocabulary."""
        known = self._tokenizer.get_vocab()
        written = any("<|channel|>" in source for source in self._template_sources)
        return written and all(mark in known for mark in MARKS)

    @cached_property
    def calls_in_channels(self) -> bool:
        """Whether the template tells of tools, and leaves it to the model in which channel it begins."""
        if not self.has_channels or "tools" not in self.template_variables:
            return False
        try:
            return self._rendered([QUESTION], (), True).rstrip().endswith(TURN)
        except InvalidInput:
            return False

    @cached_property
    def _signs(self) -> Mapping[int, str]:
        """The signs of channels' marks, by their tokens."""
        return {self._tokenizer.convert_tokens_to_ids(mark): sign for mark, sign in SIGNS.items()}

    def _is_text(self, marks: str) -> bool:
        """Whether they come out of `decode`, which leaves special tokens out."""
        special = frozenset(self._tokenizer.all_special_ids)
        return special.isdisjoint(self._tokenizer.encode(marks, add_special_tokens=False))

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        open_end: bool,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=open_end,
                **(options or {}),
            )
        except (TemplateError, TypeError) as error:  # templates refuse what they have no form for, as a system message
            raise InvalidInput(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return text

    def spell(self, token: int) -> tuple[str, bytes]:
        """A token's text and bytes; a special one has its name and no bytes, a piece of a character `bytes:\\x..`."""
        raw = self.words.bytes_of(token)
        if not raw:
            return str(self._tokenizer.convert_ids_to_tokens(token)), b""
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{code:02x}" for code in raw), raw

    def decode(self, tokens: Sequence[int], *, channels: bool = False) -> str:
        """Special tokens left out; with `channels`, which takes a model that has them, their marks are signs in it."""
        if not channels:
            return self._plain(tokens)
        text, run = "", list[int]()
        for token in tokens:
            if token in self._signs:
                text, run = text + self._plain(run) + self._signs[token], []
            else:
                run.append(token)
        return text + self._plain(run)

    def _plain(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _eos_ids(folder: Path, own: int | None) -> frozenset[int]:
    """Every token that ends an answer: generation_config.json may name several, config.json or the tokenizer one."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        ids = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset() if own is None else frozenset([own])


class Detokenizer:
    """Tokens in, text out as soon as it is certain: an incomplete character is held back. `channels` as in `decode`."""

    def __init__(self, tokenizer: Tokenizer, *, channels: bool = False) -> None:
        self._tokenizer = tokenizer
        self._channels = channels
        self._tokens: list[int] = []
        self._start = 0  # decoding starts here, a few tokens back, since some tokenizers join neighbours
        self._shown = 0  # the tokens before this one are in the text already given

    def push(self, token: int) -> str:
        self._tokens.append(token)
        known, text = self._decoded()
        if text.endswith(INCOMPLETE):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def flush(self) -> str:
        """What was held back, as it is: bytes that never became a character show as a replacement sign."""
        known, text = self._decoded()
        self._start, self._shown = self._shown, len(self._tokens)
        return text[len(known) :]

    def _decoded(self) -> tuple[str, str]:
        known = self._tokenizer.decode(self._tokens[self._start : self._shown], channels=self._channels)
        return known, self._tokenizer.decode(self._tokens[self._start :], channels=self._channels)


class StopFilter:
    """Text in, text out up to the first stop string, or with it. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        if self.stopped or not text:
            return ""
        self._held += text
        found = [(at, len(stop)) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            at, length = min(found)
            out, self._held = self._held[: at + length * self._include], ""
            return out
        keep = self._possible_start()
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def flush(self) -> str:
        """The answer ended otherwise: what looked like the beginning of a stop string is text."""
        out, self._held = self._held, ""
        return out

    def _possible_start(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
