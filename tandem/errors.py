"""The errors that a client can meet: each a ``TandemError`` with ``code``, ``message`` and ``field``."""

from protocol.errors import (
    ContextTooLongError,
    DeadlineExceededError,
    InstanceFailedError,
    InvalidRequestError,
    NotFoundError,
    ProtocolError,
    QueueFullError,
    SlowReaderError,
    TandemError,
    UnavailableError,
)

__all__ = [
    "ContextTooLongError",
    "DeadlineExceededError",
    "InstanceFailedError",
    "InvalidRequestError",
    "NotFoundError",
    "ProtocolError",
    "QueueFullError",
    "SlowReaderError",
    "TandemError",
    "UnavailableError",
]
