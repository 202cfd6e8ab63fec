"""A conversation as a chat template sees it: plain data, in which nothing could become a token's name.

Published templates take the arguments of a call in three ways: some write them as data (``tojson``), some
ask whether they are text, and some add them to other text. So where a template asks, it gets the text that
the model wrote; else data that is text too where it is used as text.
"""

import json
import re
from typing import Any

from orchestrator.text.guard import Guard
from orchestrator.text.template import wants_text_of_arguments
from protocol.chat import MAX_DEPTH, ChatMessage, FunctionCall, Tool, VariableValue

Names = re.Pattern[str]


class Arguments(dict[str, Any]):
    """A call's arguments as data, which a template may use as the text they were written as."""

    def __init__(self, data: dict[str, Any], text: str) -> None:
        super().__init__(data)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __add__(self, other: str) -> str:
        return self._text + other

    def __radd__(self, other: str) -> str:
        return other + self._text


class Conversation:
    """Everything that is to be rendered. ``messages``, ``tools`` and ``variables`` are guarded."""

    def __init__(
        self,
        messages: list[ChatMessage],
        tools: list[Tool],
        variables: dict[str, VariableValue],
        template: str,
        *,
        added_names: Names,
        special_names: Names,
    ) -> None:
        """``added_names`` are cut in what users and tools say, ``special_names`` in what the model said.

        A model's own words may hold its marks for thinking and tools, which templates look for.
        Errors: ``InvalidRequestError`` of ``Guard``.
        """
        self._as_text = wants_text_of_arguments(template)
        self._special_names = special_names
        described = [_without_none(tool) for tool in tools]
        plain = [_without_none(message) for message in messages]
        # What escapes stand for is said too.
        data = [_data_of(call.function) for message in messages for call in message.tool_calls or ()]
        self.guard = Guard(template, [plain, described, variables, data])
        self.tools = self.guard.guard(described, added_names) or None
        self.variables = self.guard.guard(variables, added_names)
        self.messages = [
            self._assistant(message, data)
            if message.role == "assistant"
            else self.guard.guard(data, added_names)
            for message, data in zip(messages, plain, strict=True)
        ]

    def _assistant(self, message: ChatMessage, data: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = self.guard.guard(data, self._special_names)
        for call, shown in zip(message.tool_calls or [], found.get("tool_calls", []), strict=True):
            shown["function"]["arguments"] = self._arguments(call.function)
        # Templates test it, and some add to it.
        found.setdefault("content", "")
        return found

    def _arguments(self, call: FunctionCall) -> Any:
        text = self.guard.guard(call.arguments, self._special_names)
        if self._as_text:
            return text
        data = _data_of(call)
        if data is None:
            return text
        return Arguments(self.guard.guard(data, self._special_names), text)


def _data_of(call: FunctionCall) -> dict[str, Any] | None:
    """Return a call's arguments; None where they are no object that could be rendered as one."""
    try:
        data = json.loads(call.arguments)
        # Half of a surrogate pair, which an escape can stand for, is no text.
        json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and _depth(data) <= MAX_DEPTH else None


def _depth(data: Any) -> int:
    """Return how deep lists and objects are nested, or something over ``MAX_DEPTH``."""
    level, found = [data], 0
    while level and found <= MAX_DEPTH:
        inner = [list(item.values()) if isinstance(item, dict) else item for item in level]
        level = [each for items in inner if isinstance(items, list) for each in items]
        found += 1
    return found


def _without_none(said: Any) -> Any:
    """Return a struct as plain data, without what is not given."""
    match said:
        case list():
            return [_without_none(item) for item in said]
        case dict():
            return {key: _without_none(value) for key, value in said.items()}
        case _ if hasattr(said, "__struct_fields__"):
            fields = {name: getattr(said, name) for name in said.__struct_fields__}
            return {name: _without_none(value) for name, value in fields.items() if value is not None}
        case _:
            return said
