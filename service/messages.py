"""Chat messages and tools as clients write them. What the model is shown of them is `prompts`' concern."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from store.errors import InvalidInput

MOST_TOOLS = 128


class Part(BaseModel):
    """Fields that nobody here knows are accepted for the clients' sake: names, annotations, refusals."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(Part):
    type: Literal["text"]
    text: str


class CalledFunction(Part):
    name: Annotated[str, Field(min_length=1)]
    arguments: str = "{}"


class ToolCall(Part):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs `content`; only an assistant's with `tool_calls` may do without")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant's message has `tool_calls`")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a tool's message needs the `tool_call_id` of the call that it answers")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class Function(Part):
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # arguments follow the parameters' schema in any case

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        return self.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


class Tool(Part):
    type: Literal["function"]
    function: Function

    def spec(self) -> dict[str, Any]:
        """As chat templates want it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(Part):
    name: str


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


class Tools(BaseModel):
    """The fields about tools, of which a request may have any."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tools")
    @classmethod
    def _different(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("two tools have the same name")
        return tools

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the model may call: none where the choice is none. Refuses a choice among others."""
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidInput(
                f"`tool_choice` names {self.tool_choice.function.name!r}, which is not among the tools {names}.",
                param="tool_choice",
            )
        if self.tool_choice == "required" and not names:
            raise InvalidInput("`tool_choice` is required, and there are no tools.", param="tool_choice")
        return () if self.tool_choice == "none" else tuple(self.tools or ())


class TemplateFields(Tools):
    """All that the chat template may be told beside the messages."""

    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
