"""What the gateway keeps of its clients: connections, their streams, and the choices of a stream."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.outbox import Backlog
from orchestrator.request import End, Request
from orchestrator.text.detokenizer import Detokenizer
from orchestrator.text.parsers import Parser, ReasoningDelta, TextDelta, ToolArgumentsDelta, ToolCallBegin
from orchestrator.text.stop import StopStrings
from protocol.chat import ToolCallDelta
from protocol.client import Event, Generate


@dataclass(slots=True, eq=False)
class Choice:
    """One answer of a stream, and the state of its text."""

    stream: "Stream"
    index: int
    request: Request
    detokenizer: Detokenizer
    stops: StopStrings | None
    parser: Parser | None = None
    """Tells reasoning and calls apart from text; None: all is text."""
    num_tokens: int = 0
    is_plain: bool = field(init=False)
    """Whether tokens that come go out as the text they are."""

    def __post_init__(self) -> None:
        """Say it once: it is asked for every token."""
        self.is_plain = self.stops is None and self.parser is None

    def parts(self, text: str, *, is_over: bool) -> tuple[str, str, list[ToolCallDelta]]:
        """Return what more text of the model's says to the user, what it thinks, and what it calls."""
        if self.parser is None:
            return text, "", []
        events = self.parser.push(text)
        if is_over:
            events += self.parser.finish()
        said, thought, calls = "", "", []
        for event in events:
            match event:
                case TextDelta():
                    said += event.text
                case ReasoningDelta():
                    thought += event.text
                case ToolCallBegin():
                    calls.append(ToolCallDelta(event.index, event.id, event.name))
                case ToolArgumentsDelta():
                    calls.append(ToolCallDelta(event.index, arguments=event.text))
        return said, thought, calls

    def read(self, token_ids: Sequence[int], end: End | None) -> tuple[str, int, bool]:
        """Return the text of new tokens, how many of them count, and whether a stop string ended it.

        An end or stop token has no text. The text of the first ``min_tokens`` tokens is not searched.
        """
        request, detokenizer = self.request, self.detokenizer
        silent = end is End.STOP and bool(token_ids) and token_ids[-1] in request.stop_token_ids
        spoken = token_ids[:-1] if silent else token_ids
        if self.stops is None:
            text = detokenizer.push(spoken)
            if end is not None:
                text += detokenizer.finish()
            self.num_tokens += len(token_ids)
            return text, len(token_ids), False
        text = ""
        for count, token_id in enumerate(spoken, 1):
            self.num_tokens += 1
            piece = detokenizer.push((token_id,))
            if self.num_tokens <= request.min_tokens:
                text += piece
                continue
            safe, stopped = self.stops.push(piece)
            text += safe
            if stopped:
                return text, count, True
        self.num_tokens += silent
        if end is None:
            return text, len(token_ids), False
        safe, stopped = self.stops.push(detokenizer.finish())
        return text + safe + ("" if stopped else self.stops.flush()), len(token_ids), stopped


@dataclass(slots=True, eq=False)
class Stream:
    """One client request. The gateway is its one writer."""

    id: str
    connection: "Connection"
    generate: Generate
    received_s: float
    """Monotonic seconds."""
    prompt_ids: list[int] = field(default_factory=list)
    is_thinking: bool = False
    """The prompt ends inside the model's thoughts."""
    open_choices: dict[int, Choice] = field(default_factory=dict)
    """By index; a choice leaves with its finish reason."""
    first_request: Request | None = None
    task: asyncio.Task[None] | None = None
    """Turns its text into tokens, where that takes a while."""
    first_token_s: float | None = None
    completion_tokens: int = 0
    has_ended: bool = False


@dataclass(slots=True, eq=False)
class Connection:
    """One client socket, for as long as it has streams or untaken events. The gateway is its one writer."""

    peer: bytes
    """ZeroMQ's routing id."""
    last_heard_s: float
    streams: dict[str, Stream] = field(default_factory=dict)
    num_choices: int = 0
    """Answers that its open streams ask for."""
    events: list[Event] = field(default_factory=list)
    """Of this step; sent at its end."""
    unsent: list[bytes] = field(default_factory=list)
    """Frames that its socket did not take; while there are some, events go to the backlog."""
    backlog: Backlog = field(default_factory=Backlog)
