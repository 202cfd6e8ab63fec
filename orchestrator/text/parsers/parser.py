"""``Parser``: one answer's text, in any pieces, to events that are the same for any pieces."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from orchestrator.text.parsers.events import (
    ParserEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
)
from orchestrator.text.parsers.formats import Call, ToolFormat

MAX_SECTION: Final = 1 << 18
"""Characters withheld for one section of calls; a longer one is text."""
_THINK: Final = "<think>"
_THOUGHT: Final = "</think>"
_CLOSERS: Final = {"[": "]", "{": "}", "(": ")"}


class Parser:
    """Owned by one choice. What does not turn out to be a call comes out as text, character for character.

    Text and reasoning are withheld only as long as they may be the beginning of a mark; a section of calls
    is withheld until it is whole, so that a malformed or unfinished one can still be text.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        *,
        thinks: bool,
        is_thinking: bool,
        make_id: Callable[[int], str],
        shown: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """``is_thinking``: the prompt ends in an open ``<think>``. ``make_id`` names a call.

        ``shown``: by the name of a mark that is a special token, the one character that stands for it in
        the text, and for nothing else. The name spelt out is then no mark; nobody is told the character.
        """
        self._tools = tools
        self._open, self._close = "", ""
        if tools is not None:
            self._open = shown.get(tools.open, tools.open)
            self._close = shown.get(tools.close, tools.close)
        self._think, self._thought = shown.get(_THINK, _THINK), shown.get(_THOUGHT, _THOUGHT)
        self._names = {ord(character): name for name, character in shown.items()}
        self._unsaid = dict.fromkeys(self._names)
        self._thinks = thinks
        self._is_thinking = is_thinking
        self._make_id = make_id
        self._held = ""
        self._searched = 0
        self._balance: _Balance | None = None
        self._in_section = False
        self._has_spoken = False
        self._has_thought = is_thinking
        self.num_calls = 0

    def push(self, text: str) -> list[ParserEvent]:
        """Return the events that this text completes."""
        self._held += text
        events: list[ParserEvent] = []
        while self._step(events, is_over=False):
            pass
        return events

    def finish(self) -> list[ParserEvent]:
        """Return the events of what was withheld: nothing can complete it any more."""
        events: list[ParserEvent] = []
        while self._step(events, is_over=True):
            pass
        return events

    def _step(self, events: list[ParserEvent], *, is_over: bool) -> bool:
        """Move over one part of what is held; return whether there may be another."""
        if not self._held:
            return False
        if self._in_section:
            return self._section(events, is_over)
        if self._balance is not None:
            return self._bare(events, is_over)
        if self._is_thinking:
            return self._until((self._thought,), events, is_over) is not None
        may_think = self._thinks and not self._has_thought and not self._has_spoken
        marks: tuple[str, ...] = (self._think,) if may_think else ()
        if self._tools is not None:
            marks += (self._open,)
            if self._tools.bare and not self._has_spoken and self._held.lstrip()[:1] in ("[", "{"):
                self._say(self._cut(len(self._held) - len(self._held.lstrip())), events)
                self._balance = _Balance()
                return True
        return self._until(marks, events, is_over) is not None

    def _until(self, marks: tuple[str, ...], events: list[ParserEvent], is_over: bool) -> str | None:
        """Say what stands before the first mark, and act on that mark; None where there is no whole one."""
        held = self._held
        found = self._first_of(marks)
        if found is not None and found[1] == self._think and held[: found[0]].strip():
            found = self._first_of(marks[1:])
        if found is None:
            size = 0 if is_over else _beginning(held, marks)
            self._say(self._cut(len(held) - size), events)
            return None
        at, mark = found
        self._say(self._cut(at), events)
        if mark in (self._think, self._thought):
            self._cut(len(mark))
            self._is_thinking, self._has_thought = mark == self._think, True
        else:
            self._in_section, self._searched = True, len(mark)
        return mark

    def _first_of(self, marks: tuple[str, ...]) -> tuple[int, str] | None:
        return min(((at, mark) for mark in marks if (at := self._held.find(mark)) >= 0), default=None)

    def _section(self, events: list[ParserEvent], is_over: bool) -> bool:
        tools, held = self._tools, self._held
        assert tools is not None
        close = held.find(self._close, self._searched)
        if close < 0 and not is_over and len(held) <= MAX_SECTION + len(self._close):
            self._searched = max(len(self._open), len(held) - len(self._close) + 1)
            return False
        self._in_section = False
        if 0 <= close <= MAX_SECTION:
            try:
                calls = tools.read(held[len(self._open) : close].translate(self._names))
            except ValueError:
                pass  # It is text after all.
            else:
                self._cut(close + len(self._close))
                self._call(calls, events)
                return True
        self._say(self._cut(len(self._open)), events)
        return True

    def _bare(self, events: list[ParserEvent], is_over: bool) -> bool:
        tools, balance = self._tools, self._balance
        assert tools is not None
        assert balance is not None
        end = balance.end(self._held)
        if end is None and not is_over and len(self._held) <= MAX_SECTION:
            return False
        self._balance = None
        self._has_spoken = True
        if end is not None and end <= MAX_SECTION:
            try:
                calls = tools.read(self._held[:end].translate(self._names))
            except ValueError:
                pass  # It is text after all.
            else:
                self._cut(end)
                self._call(calls, events)
                return True
        self._say(self._cut(1), events)
        return True

    def _call(self, calls: list[Call], events: list[ParserEvent]) -> None:
        self._has_spoken = True
        for call in calls:
            index = self.num_calls
            self.num_calls += 1
            events.append(ToolCallBegin(index, call.id or self._make_id(index), call.name))
            events.append(ToolArgumentsDelta(index, call.arguments))
            events.append(ToolCallEnd(index))

    def _cut(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text

    def _say(self, text: str, events: list[ParserEvent]) -> None:
        if self._unsaid:
            text = text.translate(self._unsaid)
        if not text:
            return
        if self._is_thinking:
            events.append(ReasoningDelta(text))
            return
        self._has_spoken = self._has_spoken or bool(text.strip())
        events.append(TextDelta(text))


class _Balance:
    """Finds where a bracketed text ends, each character looked at once."""

    def __init__(self) -> None:
        self._at = 0
        self._open: list[str] = []
        self._quote = ""
        self._is_escaped = False
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """Return the position after the bracket that closes the first; None: not there yet."""
        while self._end is None and self._at < len(text):
            self._take(text[self._at])
            self._at += 1
            if not self._open:
                self._end = self._at
        return self._end

    def _take(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif self._quote:
            self._is_escaped = character == "\\"
            if character == self._quote:
                self._quote = ""
        elif character in ("'", '"'):
            self._quote = character
        elif character in _CLOSERS:
            self._open.append(_CLOSERS[character])
        elif character in _CLOSERS.values():
            if character == self._open[-1]:
                self._open.pop()
            else:
                self._open.clear()  # No call: reading what is here says so.


def _beginning(text: str, marks: tuple[str, ...]) -> int:
    """Return how many characters at the end may be the beginning of a mark."""
    longest = max(map(len, marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
