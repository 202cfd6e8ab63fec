"""One message is one frame: a version byte, then msgpack.

A frame's length is bounded per boundary, before anything is decoded. Bytes that do not decode are
``ProtocolError``; a well-formed message with a wrong field is ``InvalidRequestError`` naming it.
"""

import re
from typing import Any, Final, Generic, TypeVar

import msgspec

from protocol.errors import InvalidRequestError, ProtocolError

VERSION: Final = 1
MAX_CLIENT_FRAME_BYTES: Final = 8 << 20
MAX_CONTROL_FRAME_BYTES: Final = 256 << 20

T = TypeVar("T")
_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_UNKNOWN = re.compile(r"unknown field `(?P<name>[^`]*)`")
_QUOTED = re.compile(r"(?:required field|field) `(?P<name>[^`]*)`")


class Codec(Generic[T]):
    """Encodes and decodes the messages of one boundary. Not thread-safe (it reuses its buffer)."""

    def __init__(self, kind: Any, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(kind)
        self._buffer = bytearray(1 << 16)

    def encode(self, message: T) -> bytes:
        """Return the frame of a message; ``ProtocolError`` if it is over the limit."""
        self._buffer[0:1] = bytes((VERSION,))
        self._encoder.encode_into(message, self._buffer, 1)
        if len(self._buffer) > self.max_bytes:
            raise ProtocolError(
                f"a message of {len(self._buffer)} bytes is over the limit of {self.max_bytes}"
            )
        return bytes(self._buffer)

    def decode(self, frame: bytes | memoryview) -> T:
        """Return the message of a frame."""
        size = len(frame)
        if size > self.max_bytes:
            raise ProtocolError(f"a frame of {size} bytes is over the limit of {self.max_bytes}")
        if size < 2:
            raise ProtocolError(f"a frame of {size} bytes holds no message")
        if frame[0] != VERSION:
            raise ProtocolError(
                f"protocol version {frame[0]} is not spoken here, {VERSION} is: upgrade the older side"
            )
        try:
            return self._decoder.decode(memoryview(frame)[1:])
        except msgspec.ValidationError as error:
            text = str(error)
            raise InvalidRequestError(text, field=_field_of(text)) from None
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, OverflowError) as error:
            raise ProtocolError(f"a frame does not decode: {error}") from None


def _field_of(text: str) -> str | None:
    path = _PATH.search(text)
    prefix = path["path"] if path else ""
    name = _UNKNOWN.search(text) or _QUOTED.search(text)
    if name is None:
        # Errors raised by a message's own checks start with the field's name.
        first = re.match(r"[a-z_]+", text)
        own = first[0] if first and first[0] in text.split(" ", 1)[0] else ""
        return ".".join(part for part in (prefix, own) if part) or None
    return f"{prefix}.{name['name']}" if prefix else name["name"]
