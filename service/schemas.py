"""Bodies of requests: what a client may send, checked before anything else. Answers are built in `replies`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from service.serving import Wish
from store.errors import InvalidInput
from store.records import Mode

MAX_STOPS = 16
MOST_ITEMS = 20_000  # of a task's text; the body's own limit is mostly met before
MODES: Mapping[str, Mode] = {"mask": "mask", "exact": "exact"}

Tokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Keep = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SamplingFields(BaseModel):
    """What both `/v1/query` and the OpenAI routes say about sampling. None: the engine's default."""

    model_config = ConfigDict(strict=True)

    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    seed: Seed | None = None
    stop: Text | Stops | None = None
    ignore_eos: bool | None = None
    stream: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ExpertOptions(Body):
    """How a request chooses its experts."""

    task: Text | None = None
    mode: str | None = None
    keep: Keep | None = None
    scorer: Text | None = None

    def wish(self) -> Wish:
        return Wish(self.task, checked_mode(self.mode), self.keep, self.scorer)


class QueryBody(SamplingFields, ExpertOptions):
    """`POST /v1/query`."""

    query: Text


class RetrieveBody(Body):
    """`POST /v1/retrieve`."""

    query: Text


class TokenizeBody(Body):
    """`POST /tokenize`."""

    model: str | None = None
    prompt: str


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(min_length=1)]


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class JobBody(Body):
    """`POST /v1/jobs`."""

    task: Text


class Turn(Body):
    role: Literal["system", "user", "assistant"]
    content: Text


class ItemBody(Body):
    """One item of calibration or evaluation text: a prompt, a prompt with its answer, or a conversation."""

    prompt: Text | None = None
    response: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> ItemBody:
        if (self.prompt is None) == (self.messages is None) or (self.messages and self.response is not None):
            raise ValueError("an item is {prompt}, {prompt, response} or {messages}")
        return self

    def json_item(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class TaskBody(Body):
    """`POST /v1/tasks`. Without calibration items the exemplars are the calibration text."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=2000)] = ""
    exemplars: Annotated[list[Text], Field(max_length=1000)] = Field(default_factory=list)
    calibration: Annotated[list[ItemBody], Field(max_length=MOST_ITEMS)] = Field(default_factory=list)
    evaluation: Annotated[list[ItemBody], Field(max_length=MOST_ITEMS)] = Field(default_factory=list)

    @model_validator(mode="after")
    def _has_text(self) -> TaskBody:
        if not self.exemplars and not self.calibration:
            raise ValueError("a task needs exemplars, calibration items, or both")
        return self


def checked_mode(mode: str | None) -> Mode | None:
    if mode is None or mode in MODES:
        return MODES[mode] if mode else None
    why = "Mode auto (mask with a guard) is not built yet" if mode == "auto" else f"No mode is named {mode!r}"
    raise InvalidInput(
        f"{why}: ask for mask (route only inside the task's selection) or exact (route freely, page in what misses).",
        param="mode",
    )


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn. Tool messages are refused, as tools are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = False
    continuous_usage_stats: bool = False


class OpenAIBody(SamplingFields):
    """Fields that both OpenAI routes share.

    A field that we can't honour is refused unless its value asks for nothing (`NEUTRAL`); labels are accepted
    (`HARMLESS`); a field nobody here has heard of is accepted for the clients' sake and named in the receipt.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    NEUTRAL: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "n": (1,),
        "best_of": (1,),
        "logprobs": (False,),
        "top_logprobs": (0,),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "top_k": (-1, 0),
        "min_p": (0,),
        "min_tokens": (0,),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "reasoning_effort": ("none",),
        "chat_template_kwargs": ({},),
        "modalities": (["text"],),
        "audio": (),
        "echo": (False,),
        "suffix": ("",),
    }
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"user", "metadata", "parallel_tool_calls", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
    )

    model: Text
    stream_options: StreamOptions | None = None
    expert: ExpertOptions | None = None

    @field_validator("stream", mode="before")
    @classmethod
    def _no_stream(cls, value: object) -> object:
        return False if value is None else value

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
        return tuple(sorted(name for name in extra if name not in known))


class ChatBody(OpenAIBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Tokens | None = None

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

    prompt: str | list[str] | list[int] | list[list[int]]

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise InvalidInput("`prompt` is an empty list. Send at least one text or token id.", param="prompt")
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


def _same(value: object, neutral: object) -> bool:
    """Equality in which true is not 1: `logprobs: 0` of a completion asks for something, `false` for nothing."""
    return isinstance(value, bool) == isinstance(neutral, bool) and value == neutral


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
