"""Bodies of the service's own routes, checked before anything else; OpenAI's are in `bodies`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.messages import Message, TemplateFields
from service.serving import Wish
from store.errors import InvalidInput
from store.records import Mode

MAX_STOPS = 16
MOST_ITEMS = 20_000  # of a task's text; the body's own limit is mostly met before
MODES: Mapping[str, Mode] = {"mask": "mask", "exact": "exact", "auto": "auto"}

Tokens = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Repetition = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[Count], Field(max_length=64)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AlarmRate = Annotated[float, Field(gt=0, le=0.5, allow_inf_nan=False)]
Keep = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Text], Field(max_length=MAX_STOPS)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SamplingFields(BaseModel):
    """What both `/v1/query` and the OpenAI routes say about sampling. None: the engine's default.

    `top_k` 0 and -1 keep all. `logit_bias` names tokens by their ids.
    """

    model_config = ConfigDict(strict=True)

    max_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    seed: Seed | None = None
    stop: Text | Stops | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Repetition | None = None
    logit_bias: dict[str, Bias] | None = None
    stream: bool = False

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ExpertOptions(Body):
    """How a request chooses its experts. One of priority `background` never makes others wait for its experts;
    requests of one `session` keep their task until their queries drift. `max_swap_ms` refuses (503) what would wait
    longer than that for its experts, as predicted; `alarm_rate` is that of mode auto, in the setting's place; `active`
    is the share of a token's calls of experts that is made, for faster answers at the price in its evidence.
    """

    task: Text | None = None
    mode: str | None = None
    keep: Keep | None = None
    scorer: Text | None = None
    max_swap_ms: Milliseconds | None = None
    alarm_rate: AlarmRate | None = None
    active: Keep | None = None
    priority: Literal["normal", "background"] | None = None
    session: Annotated[str, Field(min_length=1, max_length=256)] | None = None

    def wish(self) -> Wish:
        return Wish(
            self.task, checked_mode(self.mode), self.keep, self.scorer, self.alarm_rate, self.max_swap_ms, self.active
        )


class QueryBody(SamplingFields, ExpertOptions):
    """`POST /v1/query`."""

    query: Text


class RetrieveBody(Body):
    """`POST /v1/retrieve`."""

    query: Text


class PrefetchBody(Body):
    """`POST /v1/residency/prefetch`."""

    task: Text
    keep: Keep | None = None
    scorer: Text | None = None
    active: Keep | None = None


class TokenizeBody(TemplateFields, Body):
    """`POST /tokenize`: a text, or messages in the model's chat template, with the fields that tell a chat's one."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool = True  # of a text; a template writes its own
    add_generation_prompt: Literal[True] = True
    continue_final_message: Literal[False] = False
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either `prompt` or `messages`")
        return self


class DetokenizeBody(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(min_length=1)]


class EmbeddingsBody(Body):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=256)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: str | None = None


Names = Annotated[list[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]], Field(min_length=1, max_length=64)]


class JobOptions(Body):
    """Options of `moepager profile`."""

    scorers: Names | None = None
    allocators: Names | None = None
    keeps: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=32)] | None = None
    stand_ins: Names | None = None
    active: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1, max_length=8)] | None = None
    draws: Annotated[int, Field(gt=0, le=10)] | None = None
    search: bool = False
    off_task: bool = False
    own_answers: Annotated[int, Field(gt=0, le=4096)] | None = None

    def options(self) -> dict[str, Any]:
        """What was chosen, by name."""
        chosen = self.model_dump(include=set(JobOptions.model_fields))
        return {name: value for name, value in chosen.items() if value not in (None, False)}


class JobBody(JobOptions):
    """`POST /v1/jobs`."""

    task: Text


class AcceptBody(JobOptions):
    """`POST /v1/proposals/{id}/accept`: the new task's name, the queries that are none of it, options of its job."""

    name: Text | None = None
    description: str = ""
    without: list[str] = []
    own_answers: Annotated[int, Field(gt=0, le=4096)] | None = 64


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
    raise InvalidInput(
        f"No mode is named {mode!r}: ask for mask (route only inside the task's selection), exact (route freely, page "
        "in what misses) or auto (mask, finished exactly where the guard sees the query stray).",
        param="mode",
    )
