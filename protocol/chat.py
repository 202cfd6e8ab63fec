"""What a conversation is made of: messages, tools, and calls of tools. The shapes are OpenAI's chat API's.

Data of a user's own making (a tool's schema) is JSON: its depth is bounded here, its size by the frame.
"""

import math
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

MAX_DEPTH: Final = 64
"""Levels of a schema."""

Role = Literal["system", "user", "assistant", "tool"]
FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.\-]{1,64}$")]
CallId = Annotated[str, Meta(min_length=1, max_length=256)]
Variable = Annotated[str, Meta(pattern=r"^[a-zA-Z][a-zA-Z0-9_]{0,63}$")]
VariableValue = bool | int | float | Annotated[str, Meta(max_length=4096)] | None


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which function, and its arguments as the text of a JSON object."""

    name: FunctionName
    arguments: str


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One whole call that a model made."""

    id: CallId
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, frozen=True, omit_defaults=True):
    """More of call ``index`` of a choice: ``id`` and ``name`` come first and once, ``arguments`` add up."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a model is told about a function. ``parameters`` is a JSON schema."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        _check_json(self.parameters, 0)


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that a model may call."""

    type: Literal["function"]
    function: Function


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a function."""

    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation. Only an assistant that calls tools or has thought may say nothing."""

    role: Role
    content: str | None = None
    name: Annotated[str, Meta(max_length=256)] | None = None
    """Of the tool that answers, or of who speaks."""
    tool_calls: Annotated[list[ToolCall], Meta(max_length=128)] | None = None
    """An assistant's calls."""
    tool_call_id: CallId | None = None
    """The call that a tool's message answers."""
    reasoning_content: str | None = None
    """What an assistant thought; a model's template decides what of it is shown."""

    def __post_init__(self) -> None:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("role: only an assistant has tool_calls and reasoning_content")
        if self.content is None and not self.tool_calls and self.reasoning_content is None:
            raise ValueError("content is missing: a message says something or calls a tool")


def _check_json(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"parameters are nested deeper than {MAX_DEPTH}")
    match value:
        case None | bool() | int() | str():
            return
        case float():
            if math.isfinite(value):
                return
        case list():
            for item in value:
                _check_json(item, depth + 1)
            return
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    break
                _check_json(item, depth + 1)
            else:
                return
    raise ValueError("parameters must be JSON: objects, lists, strings, finite numbers, true, false, null")
