"""What a model says, told apart while it arrives: text, reasoning and tool calls.

``Parser`` is the way in, ``find_format`` says which marks a checkpoint uses. No torch, no I/O.
"""

from orchestrator.text.parsers.events import (
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from orchestrator.text.parsers.formats import ToolFormat, find_format
from orchestrator.text.parsers.parser import Parser

__all__ = [
    "Parser",
    "ParserEvent",
    "ReasoningDelta",
    "TextDelta",
    "ToolArgumentsDelta",
    "ToolCallBegin",
    "ToolCallEnd",
    "ToolFormat",
    "find_format",
]
