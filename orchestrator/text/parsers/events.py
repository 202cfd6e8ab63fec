"""The events of one answer. ``index`` counts its tool calls from 0; a call's events are not interleaved."""

import msgspec


class TextDelta(msgspec.Struct, frozen=True):
    """More of what is said to the user."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More of what the model thinks before it speaks."""

    text: str


class ToolCallBegin(msgspec.Struct, frozen=True):
    """A call of a function; its arguments follow."""

    index: int
    id: str
    name: str


class ToolArgumentsDelta(msgspec.Struct, frozen=True):
    """More of a call's arguments; all of them together are one JSON object."""

    index: int
    text: str


class ToolCallEnd(msgspec.Struct, frozen=True):
    """The call is whole."""

    index: int


ParserEvent = TextDelta | ReasoningDelta | ToolCallBegin | ToolArgumentsDelta | ToolCallEnd
