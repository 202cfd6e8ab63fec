"""A ROUTER socket on the asyncio loop: raw non-blocking sends and receives, no futures."""

import asyncio
import errno
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path
from typing import Final

import zmq

from protocol.errors import StorageError
from protocol.framing import MAX_CLIENT_FRAME_BYTES

HIGH_WATER_MESSAGES: Final = 64
"""Frames in either direction that ZeroMQ holds for one peer."""
LINGER_MS: Final = 500
MESSAGES_A_TURN: Final = 64
"""Received before the loop gets to do something else."""


class Sent(Enum):
    """What became of a frame."""

    YES = auto()
    FULL = auto()
    """The peer's queue is full: try again later."""
    GONE = auto()
    """No peer by that id is connected (any more)."""


class Router:
    """Owns the socket. ``on_message(peer, frame)`` gets every message of a peer, in order.

    A frame of more than ``max_bytes`` loses its sender the connection. The default is above a client
    frame's own limit, so that one a little too large gets its answer in words.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[bytes, bytes], None],
        *,
        max_bytes: int = 2 * MAX_CLIENT_FRAME_BYTES,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        options = {
            zmq.ROUTER_MANDATORY: 1,
            zmq.SNDHWM: HIGH_WATER_MESSAGES,
            zmq.RCVHWM: HIGH_WATER_MESSAGES,
            zmq.MAXMSGSIZE: max_bytes,
            zmq.LINGER: LINGER_MS,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise StorageError(f"the socket {address} cannot be made: {error.strerror}") from None
        if address.startswith("ipc://"):
            Path(address.removeprefix("ipc://")).chmod(0o600)
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive)
        self._again: asyncio.Handle | None = self._loop.call_soon(self._receive)

    def send(self, peer: bytes, frame: bytes) -> Sent:
        """Hand a frame to ZeroMQ, or say why not; never blocks."""
        socket, sent = self._socket, Sent.YES
        try:
            socket.send(peer, zmq.NOBLOCK | zmq.SNDMORE)
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            sent = Sent.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            sent = Sent.GONE
        # The descriptor is edge-triggered, and any call may have swallowed the edge of an arrival.
        if self._again is None and int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._again = self._loop.call_soon(self._receive)
        return sent

    def close(self) -> None:
        """Close the socket; what was sent has ``LINGER_MS`` to leave."""
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        if self._again is not None:
            self._again.cancel()
        self._socket.close()
        self._context.term()

    def _receive(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for _ in range(MESSAGES_A_TURN):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A message of several frames is none of ours; as an empty one it is refused in words.
            self._on_message(peer, frames[0] if len(frames) == 1 else b"")
            if self._socket.closed:
                return
        if self._again is None:
            self._again = self._loop.call_soon(self._receive)
