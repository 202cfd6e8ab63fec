"""The clients that are connected, and the sending of what is for them: one frame each per step.

What a client's socket does not take waits for it, merged and bounded.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.outbox import frames
from orchestrator.router import Router, Sent
from orchestrator.streams import Connection
from protocol.client import SILENCE_LIMIT_S, Event, from_gateway_codec
from protocol.errors import QueueFullError, SlowReaderError, TandemError


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """Bounds of what clients may make the gateway hold."""

    silence_s: float = SILENCE_LIMIT_S
    connections: int = 1024
    streams_per_connection: int = 1024
    choices_per_connection: int = 2048
    backlog_bytes: int = 4 << 20
    """Untaken events of one connection; more cancels its streams, twice as much forgets it."""
    check_s: float = 1.0
    """How often silence is looked for, while streams are open."""
    retry_s: float = 0.01
    """How often a full socket is tried again, while one is."""


class Connections:
    """Owns the socket's sending side, the connections, and the timers for silence and for full sockets.

    ``end_streams(connection, error)`` is called where all streams of a connection must end: with an error,
    or without one where the client is gone.
    """

    def __init__(
        self,
        limits: GatewayLimits,
        end_streams: Callable[[Connection, TandemError | None], None],
        clock: Callable[[], float],
    ) -> None:
        self._limits = limits
        self._end_streams = end_streams
        self._clock = clock
        self._codec = from_gateway_codec()
        self._router: Router | None = None
        self._by_peer: dict[bytes, Connection] = {}
        self.dirty: list[Connection] = []
        """Those with events that the next flush sends."""
        self._silence_timer: asyncio.TimerHandle | None = None
        self._retry_timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._by_peer)

    def all(self) -> list[Connection]:
        """Return the connections that have streams or untaken events."""
        return list(self._by_peer.values())

    def attach(self, router: Router) -> None:
        """Send through this socket from now on."""
        self._router = router

    def close(self) -> None:
        """Send what can be sent, and close the socket."""
        self.flush()
        for timer in (self._silence_timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        if self._router is not None:
            self._router.close()
            self._router = None
        self._by_peer.clear()

    def hear(self, peer: bytes) -> Connection:
        """Return the connection that has just spoken; ``QueueFullError`` where it is one too many."""
        connection = self._by_peer.get(peer)
        if connection is None:
            if len(self._by_peer) >= self._limits.connections:
                raise QueueFullError(
                    f"{self._limits.connections} connections are served already: try again later"
                )
            connection = self._by_peer[peer] = Connection(peer, 0.0)
        connection.last_heard_s = self._clock()
        return connection

    def answer(self, peer: bytes, event: Event) -> None:
        """Send one event to somebody who is no connection; lost where the socket does not take it."""
        if self._router is not None:
            for frame in frames(self._codec, [event]):
                self._router.send(peer, frame)

    def push(self, connection: Connection, event: Event) -> None:
        """Add an event to what the next flush sends."""
        if not connection.events:
            self.dirty.append(connection)
        connection.events.append(event)

    def flush(self) -> None:
        """Send every connection its events."""
        while self.dirty:
            connection = self.dirty.pop()
            self._send(connection)
            if not connection.streams:
                self.forget_if_done(connection)

    def forget_if_done(self, connection: Connection) -> None:
        """Keep nothing of a connection that has no streams and no untaken events."""
        if not (connection.streams or connection.events or connection.unsent or len(connection.backlog)):
            self._forget(connection)

    def _forget(self, connection: Connection) -> None:
        if self._by_peer.get(connection.peer) is connection:
            del self._by_peer[connection.peer]

    def _send(self, connection: Connection) -> None:
        events, connection.events = connection.events, []
        if not events:
            return
        if connection.unsent:
            connection.backlog.extend(events)
            self._retry(connection)
            self._check_backlog(connection)
        else:
            self._send_frames(connection, frames(self._codec, events))

    def _send_frames(self, connection: Connection, unsent: list[bytes]) -> None:
        if self._router is None:
            return
        for sent, frame in enumerate(unsent):
            match self._router.send(connection.peer, frame):
                case Sent.YES:
                    continue
                case Sent.GONE:
                    self._abandon(connection)
                    return
                case Sent.FULL:
                    connection.unsent = unsent[sent:]
                    self._watch_unsent()
                    return
        connection.unsent = []

    def _retry(self, connection: Connection) -> None:
        self._send_frames(connection, connection.unsent)
        if not connection.unsent and len(connection.backlog):
            self._send_frames(connection, frames(self._codec, connection.backlog.take()))

    def _check_backlog(self, connection: Connection) -> None:
        size, limit = connection.backlog.size_bytes, self._limits.backlog_bytes
        if size > 2 * limit:
            self._abandon(connection)
        elif size > limit and connection.streams:
            error = SlowReaderError(
                f"{size} bytes of events wait to be read, {limit} may: read faster, or ask for less"
            )
            self._end_streams(connection, error)

    def _abandon(self, connection: Connection) -> None:
        """Forget a connection that is gone, or as good as gone, and everything that was for it."""
        self._end_streams(connection, None)
        connection.events, connection.unsent = [], []
        connection.backlog.take()
        self._forget(connection)

    # Neither timer runs while nothing is open.

    def watch_silence(self) -> None:
        """Look for silent clients from now on, until no connection is left."""
        if self._silence_timer is None and self._router is not None:
            loop = asyncio.get_running_loop()
            self._silence_timer = loop.call_later(self._limits.check_s, self._look_for_silence)

    def _look_for_silence(self) -> None:
        self._silence_timer = None
        now = self._clock()
        for connection in self.all():
            silence_s = now - connection.last_heard_s
            if silence_s > 2 * self._limits.silence_s:
                self._abandon(connection)
            elif silence_s > self._limits.silence_s:
                # A client that lives but said nothing still gets its terminal events, if it takes them now.
                self._end_streams(connection, None)
        self.flush()
        if self._by_peer:
            self.watch_silence()

    def _watch_unsent(self) -> None:
        if self._retry_timer is None:
            loop = asyncio.get_running_loop()
            self._retry_timer = loop.call_later(self._limits.retry_s, self._retry_all)
            self.watch_silence()

    def _retry_all(self) -> None:
        self._retry_timer = None
        for connection in self.all():
            if connection.unsent:
                self._retry(connection)
                self.forget_if_done(connection)
        if any(c.unsent for c in self.all()):
            self._watch_unsent()
