"""A client that counts: every event of every stream, and when it came. No SDK between."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import zmq

from protocol.client import (
    KEEP_ALIVE_S,
    Cancelled,
    Delta,
    Event,
    Failed,
    Finished,
    Generate,
    KeepAlive,
    from_gateway_codec,
    to_gateway_codec,
)

POLL_MS = 100
TERMINAL = (Finished, Cancelled, Failed)


@dataclass
class Stream:
    """What has come of one request."""

    events: list[tuple[float, Event]] = field(default_factory=list)
    """With the monotonic time of their arrival."""

    @property
    def terminals(self) -> list[Event]:
        return [event for _, event in self.events if isinstance(event, TERMINAL)]

    @property
    def token_ids(self) -> list[int]:
        return [t for _, event in self.events if isinstance(event, Delta) for t in event.token_ids]

    @property
    def is_open(self) -> bool:
        return not self.terminals

    @property
    def ended_s(self) -> float:
        return next(at_s for at_s, event in self.events if isinstance(event, TERMINAL))


class Streams:
    """One connection, and what has come over it, by stream. Used in one thread."""

    def __init__(self, address: str) -> None:
        self._codec, self._events = to_gateway_codec(), from_gateway_codec()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 2**31 - 1)
        self._socket.connect(address)
        self._spoke_s = 0.0
        self.by_id: dict[str, Stream] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._context.term()

    def __getitem__(self, stream_id: str) -> Stream:
        return self.by_id[stream_id]

    def ask(self, stream_id: str, **fields: Any) -> None:
        """Open a stream; without another prompt it is of token ids, and no token ends it."""
        if "messages" not in fields:
            fields = {"prompt_ids": [5, 6, 7], "ignore_eos": True} | fields
        self.by_id[stream_id] = Stream()
        self._send(Generate(stream_id, **fields))

    def until(self, is_so: Callable[[], Any], timeout_s: float, what: str) -> None:
        """Take events in until something is so."""
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            self.take(POLL_MS)
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}; {self._summary()}"

    def until_running(self, *stream_ids: str, timeout_s: float = 30.0) -> None:
        """Wait until each of these has more than one token: the steps they are in follow one another."""
        counts = {stream_id: len(self[stream_id].token_ids) for stream_id in stream_ids}
        self.until(
            lambda: all(len(self[i].token_ids) >= count + 2 for i, count in counts.items()),
            timeout_s,
            f"tokens of {', '.join(stream_ids)}",
        )

    def until_ended(self, timeout_s: float) -> None:
        """Wait until no stream is open."""
        self.until(lambda: not any(s.is_open for s in self.by_id.values()), timeout_s, "all streams end")

    def take(self, wait_ms: int) -> bool:
        """Take in what is there, or comes within the time; whether anything did."""
        if time.monotonic() - self._spoke_s > KEEP_ALIVE_S:
            self._send(KeepAlive())
        if not self._socket.poll(wait_ms):
            return False
        now_s = time.monotonic()
        for event in self._events.decode(self._socket.recv()).events:
            assert event.id is not None, event
            self.by_id[event.id].events.append((now_s, event))
        return True

    def take_rest(self) -> None:
        """Take in what a server that has ended left on its way."""
        while self.take(POLL_MS):
            pass

    def _send(self, message: Generate | KeepAlive) -> None:
        self._spoke_s = time.monotonic()
        try:
            self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            pass  # The server is gone: what it has sent is still to be read.

    def _summary(self) -> str:
        return str({i: (len(s.token_ids), s.terminals) for i, s in self.by_id.items()})
