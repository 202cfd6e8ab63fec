"""The exception tree. Every error says what was asked, what was found and what to do.

``code`` is stable and part of the protocol; ``field`` names the input at fault where there is one.
An error crosses a process boundary as ``ErrorInfo`` and is raised again on the other side.
"""

import msgspec

COLLECTIVE_CODE = "collective"
"""Of a rank that waited for its peers in vain. A worker's own; clients do not see it."""


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error on the wire."""

    code: str
    message: str
    field: str | None = None


class TandemError(Exception):
    """Root of every error that tandem raises on purpose."""

    code = "error"

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field

    def info(self) -> ErrorInfo:
        """Return this error as it crosses the wire."""
        return ErrorInfo(code=self.code, message=self.message, field=self.field)


class InvalidRequestError(TandemError):
    """The request itself is wrong; sending it again will not help."""

    code = "invalid_request"


class ContextTooLongError(InvalidRequestError):
    """Prompt and answer cannot fit the context or the KV pool."""

    code = "context_too_long"


class UnknownModelError(TandemError):
    """No model by that name or directory."""

    code = "unknown_model"


class ModelFormatError(TandemError):
    """A model directory that contradicts itself or is malformed: config, headers or tensors."""

    code = "model_format"


class UnsupportedModelError(TandemError):
    """A well-formed model of a kind that tandem does not serve."""

    code = "unsupported_model"


class LayoutError(TandemError):
    """Degrees of parallelism that this model cannot be cut into."""

    code = "impossible_layout"


class MemoryBudgetError(TandemError):
    """What was asked does not fit the memory budget; the message says what would."""

    code = "does_not_fit"


class StorageError(TandemError):
    """A cache or directory that cannot be read or written."""

    code = "storage"


class DownloadError(TandemError):
    """A model that could not be fetched, or came with other bytes than were published."""

    code = "download"


class QueueFullError(TandemError):
    """Admission control refused: the queue is at its bound. Try again later."""

    code = "queue_full"


class DeadlineExceededError(TandemError):
    """The request's own deadline passed before it was done."""

    code = "deadline_exceeded"


class UnavailableError(TandemError):
    """The instance cannot take requests now: starting, draining, or failed."""

    code = "unavailable"


class InstanceFailedError(UnavailableError):
    """A rank was lost and the instance gave up; every open stream ends with this."""

    code = "instance_failed"


class ProtocolError(TandemError):
    """Bytes that are no message of this protocol version, or break its size limits."""

    code = "protocol"


class SlowReaderError(TandemError):
    """A client takes its events so slowly that the bound on what waits for it is reached."""

    code = "slow_reader"


class NotFoundError(TandemError):
    """No running instance by that name."""

    code = "not_found"


class AlreadyRunningError(TandemError):
    """An instance by that name is running already."""

    code = "already_running"


def _subclasses(root: type[TandemError]) -> dict[str, type[TandemError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_subclasses(child))
    return found


def from_info(info: ErrorInfo) -> TandemError:
    """Return the exception that ``info`` describes; an unknown code gives the root class."""
    kind = _subclasses(TandemError).get(info.code, TandemError)
    return kind(info.message, field=info.field)
