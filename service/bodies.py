"""Bodies of OpenAI's routes: what a client may send, checked before anything else. Answers are built in `replies`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.requests import MAX_LOGPROBS
from service.messages import Message, TemplateFields
from service.schemas import Count, ExpertOptions, SamplingFields, Text, Tokens
from store.errors import InvalidInput

Top = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Choices = Annotated[int, Field(ge=1, le=128)]
Prompts = str | list[str] | list[int] | list[list[int]]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None

    def unknown(self) -> list[str]:
        """Names of what else is asked for."""
        return [f"stream_options.{name}" for name, value in (self.model_extra or {}).items() if value]


class StructuredOutputs(BaseModel):
    """vLLM's way to ask for constrained answers; one of them."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: dict[str, Any] | bool | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1)] | None = None
    grammar: Text | None = None


class OpenAIBody(SamplingFields):
    """Fields that both OpenAI routes share.

    A field that we can't honour is refused unless its value asks for nothing (`NEUTRAL`); labels are accepted
    (`HARMLESS`); a field nobody here has heard of is accepted for the clients' sake and named in the receipt.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )

    model: Text
    n: Choices | None = None
    stream_options: StreamOptions | None = None
    expert: ExpertOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[Text], Field(min_length=1)] | None = None
    guided_grammar: Text | None = None

    @field_validator("stream", mode="before")
    @classmethod
    def _no_stream(cls, value: object) -> object:
        return False if value is None else value

    @property
    def choices(self) -> int:
        return self.n or 1

    def ignored(self) -> tuple[str, ...]:
        """Names of the fields that had no effect; refuses those that would have needed one."""
        extra = self.model_extra or {}
        for name, neutral in self.NEUTRAL.items():
            if name in extra and extra[name] is not None and not any(_same(extra[name], value) for value in neutral):
                allowed = " or ".join(repr(value) for value in neutral) or "null"
                raise InvalidInput(
                    f"`{name}` is not supported here: leave it out, or send {allowed}. Got {_short(extra[name])}.",
                    param=name,
                    code="unsupported_parameter",
                )
        known = self.NEUTRAL.keys() | self.HARMLESS
        unread = [name for name, value in extra.items() if name not in known and value is not None]
        if self.stream_options is not None:
            unread += self.stream_options.unknown() if self.stream else ["stream_options"]
        return tuple(sorted(unread))


class ChatBody(OpenAIBody, TemplateFields):
    """`POST /v1/chat/completions`."""

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "best_of": (1,),
        "echo": (False,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "suffix": ("",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None

    @property
    def scores(self) -> int | None:
        """How many likeliest tokens' log-probabilities are wanted beside every token's own; None: none at all."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidInput("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None

    def limit(self) -> int | None:
        both = (self.max_completion_tokens, self.max_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidInput(
                f"`max_completion_tokens` ({both[0]}) and its old name `max_tokens` ({both[1]}) differ. Send one.",
                param="max_tokens",
            )
        return both[0] if both[0] is not None else both[1]


class CompletionBody(OpenAIBody):
    """`POST /v1/completions`. A prompt is a text or token ids; several prompts are a list of either."""

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {"suffix": ("",)}

    prompt: Prompts
    max_tokens: Count | None = None  # 0 is a prompt that is only scored
    echo: bool | None = None
    logprobs: Top | Literal[False] | None = None
    best_of: Choices | None = None

    @property
    def scores(self) -> int | None:
        return None if self.logprobs is None or self.logprobs is False else self.logprobs

    @property
    def tries(self) -> int:
        """Answers to be generated for each prompt, of which `n` are given."""
        tries = self.best_of or self.choices
        if tries < self.choices:
            raise InvalidInput(f"`best_of` ({tries}) must not be less than `n` ({self.choices}).", param="best_of")
        if tries > self.choices and self.stream:
            raise InvalidInput(
                "`best_of` compares whole answers, so it can't be streamed. Leave out one of the two.", param="best_of"
            )
        return tries

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidInput("`prompt` is an empty list. Send at least one text or token id.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _same(value: object, neutral: object) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
