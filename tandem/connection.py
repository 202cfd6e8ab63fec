"""One connection to a server, on the running asyncio loop: what is open on it, and is anybody there."""

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from protocol.client import (
    Cancel,
    Cancelled,
    Event,
    Failed,
    Finished,
    GetStats,
    Info,
    KeepAlive,
    Stats,
    from_gateway_codec,
)
from protocol.errors import (
    InstanceFailedError,
    InvalidRequestError,
    ProtocolError,
    TandemError,
    UnavailableError,
)
from protocol.framing import MAX_CLIENT_FRAME_BYTES, Codec

ANSWER_LIMIT_S: Final = 10.0
"""A server that lives answers within this."""
LEAVE_MS: Final = 200
"""What was sent last has this long to leave."""
NEVER_MS: Final = 2**31 - 1
"""ZeroMQ's own word for never, -1, makes a lost connection drop what has arrived and is not read yet."""
DRAIN_S: Final = 0.05
"""Between the news of a lost connection and the end of its streams: what had arrived is still read."""
_LOST = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
_LOST |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_TERMINAL = (Finished, Cancelled, Failed, Stats, Info)


class Inbox:
    """The events of one id that its reader has not taken, or the error that it met."""

    def __init__(self, inbox_id: str) -> None:
        self.id = inbox_id
        self.is_cancelled = False
        """Whether this side has asked for the end."""
        self.is_open = True
        """Whether more will come."""
        self._events: deque[Event] = deque()
        self._error: TandemError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: Event) -> None:
        """Add an event; a terminal one is the last."""
        self._events.append(event)
        self.is_open = not isinstance(event, _TERMINAL)
        self._wake()

    def fail(self, error: TandemError) -> None:
        """End with an error, after the events that have arrived."""
        self._error = error
        self.is_open = False
        self._wake()

    async def take(self) -> list[Event]:
        """Wait for events and return all that are there; raise the error where there are none."""
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self.is_open:
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        events = list(self._events)
        self._events.clear()
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Connection:
    """Owns the socket and the inboxes. Used on one loop only; once lost it is not used again."""

    def __init__(self, address: str, *, keep_alive_s: float, answer_limit_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.error: TandemError | None = None
        """Why the connection is of no use any more."""
        self._address = address
        self._keep_alive_s = keep_alive_s
        self._answer_limit_s = answer_limit_s
        self._ids = itertools.count(1)
        self._inboxes: dict[str, Inbox] = {}
        self._codec: Codec[Any] = Codec(Any, MAX_CLIENT_FRAME_BYTES)
        self._events = from_gateway_codec()
        self._probe_sent_s: float | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._connected: asyncio.Future[None] = self.loop.create_future()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        # A server that went away is another one when it comes back: its streams are gone.
        for option, value in (
            (zmq.RECONNECT_IVL, NEVER_MS),
            (zmq.LINGER, 0),
            (zmq.MAXMSGSIZE, MAX_CLIENT_FRAME_BYTES),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(_LOST | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._descriptors = [int(s.getsockopt(zmq.FD)) for s in (self._socket, self._monitor)]
        for descriptor, callback in zip(self._descriptors, (self._receive, self._watch), strict=True):
            self.loop.add_reader(descriptor, callback)

    async def open(self, timeout_s: float) -> None:
        """Connect; ``UnavailableError`` where nobody answers in time."""
        try:
            self._socket.connect(self._address)
            self._watch()
            await asyncio.wait_for(asyncio.shield(self._connected), timeout_s)
        except (TimeoutError, zmq.ZMQError) as error:
            why = (
                f"{error.strerror}" if isinstance(error, zmq.ZMQError) else f"no answer in {timeout_s:g} s"
            )
            self.close(UnavailableError(f"no server can be reached at {self._address}: {why}"))
        if self.error is not None:
            raise self.error

    def send(self, message: Any) -> None:
        """Send a message; ``InvalidRequestError`` if it is no data, ``ProtocolError`` if it is too long."""
        if self.error is not None:
            raise self.error
        try:
            frame = self._codec.encode(message)
        except (TypeError, OverflowError, ValueError, RecursionError) as error:
            raise InvalidRequestError(f"the request cannot be sent: {error}") from None
        # The descriptor is edge-triggered: sending may swallow the edge of an arrival.
        self.loop.call_soon(self._receive)
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            raise UnavailableError(
                f"the server at {self._address} takes no messages: it may hang"
            ) from None

    def ask(self, message: dict[str, Any]) -> Inbox:
        """Send a request under a new id and return where its events come."""
        inbox = Inbox(f"{next(self._ids)}")
        self._inboxes[inbox.id] = inbox
        try:
            self.send({**message, "id": inbox.id})
        except TandemError:
            del self._inboxes[inbox.id]
            raise
        self._later("keep alive", self._keep_alive_s, self._keep_alive)
        return inbox

    def cancel(self, inbox: Inbox) -> None:
        """Ask for the end of a stream, unless it has ended; its terminal event still comes."""
        if inbox.is_open and not inbox.is_cancelled:
            inbox.is_cancelled = True
            if self.error is None:
                self.send(Cancel(inbox.id))

    def leave(self, error: TandemError) -> None:
        """Cancel what is open, as far as the server listens, and close."""
        for inbox in list(self._inboxes.values()):
            try:
                self.cancel(inbox)
            except TandemError:
                break  # It does not listen: its own watch over silence will do it.
        self.close(error, linger_ms=LEAVE_MS)

    def close(self, error: TandemError, linger_ms: int = 0) -> None:
        """Close the socket; what is still open ends with ``error``. Later calls do nothing."""
        if self.error is not None:
            return
        self.error = error
        for timer in self._timers.values():
            timer.cancel()
        if not self.loop.is_closed():
            for descriptor in self._descriptors:
                self.loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(linger_ms)
        self._context.term()
        for inbox in self._inboxes.values():
            inbox.fail(error)
        self._inboxes.clear()
        if not self._connected.done() and not self.loop.is_closed():
            self._connected.set_result(None)

    def _later(self, name: str, delay_s: float, callback: Callable[[], None]) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(delay_s, self._fire, name, callback)

    def _fire(self, name: str, callback: Callable[[], None]) -> None:
        del self._timers[name]
        callback()

    def _receive(self) -> None:
        while self.error is None:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._probe_sent_s = None
            try:
                events = self._events.decode(frame).events
            except TandemError as error:
                self.close(
                    ProtocolError(f"the server at {self._address} is not understood: {error.message}")
                )
                return
            for event in events:
                self._sort(event)

    def _sort(self, event: Event) -> None:
        if event.id is None:
            assert isinstance(event, Failed)
            # A message without an id that could be made out: no stream of ours can be told.
            self.close(ProtocolError(f"the server refused a message: {event.error.message}"))
            return
        inbox = self._inboxes.get(event.id)
        if inbox is None:
            return  # A probe's answer, or a stream whose reader is gone.
        inbox.put(event)
        if not inbox.is_open:
            del self._inboxes[inbox.id]

    def _keep_alive(self) -> None:
        """Show the server that we live, and see that it does. Ends when nothing is open."""
        self._receive()
        if self.error is not None or not self._inboxes:
            return
        now = self.loop.time()
        if self._probe_sent_s is not None and now - self._probe_sent_s > self._answer_limit_s:
            self.close(
                UnavailableError(
                    f"the server at {self._address} has not answered for {self._answer_limit_s:g} s"
                )
            )
            return
        try:
            if self._probe_sent_s is None:
                self._probe_sent_s = now
                self.send(GetStats("probe"))
            else:
                self.send(KeepAlive())
        except TandemError as error:
            self.close(error)
            return
        self._later("keep alive", self._keep_alive_s, self._keep_alive)

    def _watch(self) -> None:
        """Read the socket's own events: connected, or lost."""
        while self.error is None:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            except zmq.Again:
                return
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if not self._connected.done():
                    self._connected.set_result(None)
            elif not self._connected.done():
                self.close(
                    UnavailableError(f"no server can be reached at {self._address}: nobody listens there")
                )
            else:
                self._later("lost", DRAIN_S, self._lose)

    def _lose(self) -> None:
        self._receive()
        self.close(InstanceFailedError(f"the server at {self._address} went away"))
