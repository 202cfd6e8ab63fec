"""What waits to be sent to one client: bounded, and merged where the client is slow."""

from protocol.chat import ToolCallDelta
from protocol.client import Cancelled, Delta, Event, Events, Failed, Finished, PromptScores, Started
from protocol.control import TokenLogprobs
from protocol.errors import ProtocolError
from protocol.framing import Codec

SCORES_PER_EVENT = 2048
"""Prompt positions in one event: with 20 alternatives each, well under a frame."""


class Backlog:
    """Events that a client has not taken, the deltas of each choice merged into one.

    Nothing is dropped and a stream's events keep their order, but for deltas, which join the first of
    theirs that waits. Owned by one connection.
    """

    def __init__(self) -> None:
        self._events: list[Event | _Merged] = []
        self._merged: dict[str, dict[int, _Merged]] = {}
        self.size_bytes = 0
        """An upper estimate of what the events take on the wire."""

    def __len__(self) -> int:
        return len(self._events)

    def extend(self, events: list[Event]) -> None:
        """Take events, in order."""
        for event in events:
            self.size_bytes += _size_bytes(event)
            if not isinstance(event, Delta):
                self._events.append(event)
                if isinstance(event, Finished | Cancelled | Failed) and event.id is not None:
                    # The id may be used again: what comes then is another stream's.
                    self._merged.pop(event.id, None)
                continue
            choices = self._merged.setdefault(event.id, {})
            merged = choices.get(event.index)
            if merged is None:
                choices[event.index] = merged = _Merged(event)
                self._events.append(merged)
            else:
                merged.add(event)

    def take(self) -> list[Event]:
        """Return all events and be empty."""
        events = [event.delta() if isinstance(event, _Merged) else event for event in self._events]
        self._events, self._merged, self.size_bytes = [], {}, 0
        return events


class _Merged:
    """The deltas of one choice, as one."""

    def __init__(self, first: Delta) -> None:
        self._id, self._index = first.id, first.index
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        self._finish_reason = first.finish_reason
        self._thoughts: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self.add(first)

    def add(self, delta: Delta) -> None:
        self._token_ids.extend(delta.token_ids)
        self._texts.append(delta.text)
        self._thoughts.append(delta.reasoning)
        self._calls.extend(delta.tool_calls or ())
        if delta.logprobs is not None:
            if self._logprobs is None:
                self._logprobs = []
            self._logprobs.extend(delta.logprobs)
        self._finish_reason = delta.finish_reason

    def delta(self) -> Delta:
        return Delta(
            self._id,
            self._index,
            self._token_ids,
            "".join(self._texts),
            self._logprobs,
            self._finish_reason,
            "".join(self._thoughts),
            self._calls or None,
        )


def _size_bytes(event: Event) -> int:
    match event:
        case Delta():
            said = 4 * (len(event.text) + len(event.reasoning))
            calls = sum(512 + 4 * len(call.arguments) for call in event.tool_calls or ())
            return 128 + 5 * len(event.token_ids) + said + calls + _scores_bytes(event.logprobs)
        case PromptScores():
            return 128 + _scores_bytes(event.logprobs)
        case Started():
            return 128 + 5 * len(event.prompt_ids)
        case Failed():
            return 256 + 4 * len(event.error.message)
        case _:
            return 1024


def _scores_bytes(scores: list[TokenLogprobs] | None) -> int:
    return sum(24 + 14 * len(s.top_ids) for s in scores) if scores else 0


def split_scores(stream_id: str, start: int, scores: list[TokenLogprobs]) -> list[PromptScores]:
    """Return prompt scores as events of a bounded size."""
    return [
        PromptScores(stream_id, start + at, scores[at : at + SCORES_PER_EVENT])
        for at in range(0, len(scores), SCORES_PER_EVENT)
    ]


def frames(codec: Codec[Events], events: list[Event]) -> list[bytes]:
    """Return events as frames: one, unless that is over the limit of a frame."""
    try:
        return [codec.encode(Events(events))]
    except ProtocolError:
        if len(events) == 1:
            raise
        half = len(events) // 2
        return frames(codec, events[:half]) + frames(codec, events[half:])
