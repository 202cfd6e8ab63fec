"""A server that this process starts for itself, and that does not outlive it."""

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec

from protocol.errors import ErrorInfo, InstanceFailedError, TandemError
from protocol.runtime_dir import InstanceFacts
from tandem.instances import wait_ended

STOP_S = 10.0
"""How long a server that nobody uses any more may take to drain."""


class _Word(msgspec.Struct, frozen=True):
    """What the server's one line of standard output may be beside its facts."""

    error: ErrorInfo | None = None


class BootFailedError(TandemError):
    """A server did not get ready. It has said why on standard error; ``info`` says it too."""

    def __init__(self, why: ErrorInfo, code: int) -> None:
        super().__init__(f"the server could not be started, {ending(code)}", field=why.field)
        self._why = why

    def info(self) -> ErrorInfo:
        """Return the boot's own error."""
        return self._why


class LocalServer:
    """A server in the background, with a session of its own, so that Ctrl-C does not reach it.

    Its standard error is this process's. Its standard output is one JSON line: its facts when it is ready,
    or the error of its boot. Its standard input is a pipe held open here: when this process ends, however
    it ends, the pipe closes and the server stops. Use as a context manager: the server is gone at its end.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._pidfd = os.pidfd_open(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    def wait_ready(self) -> InstanceFacts:
        """Wait for the end of the boot, which watches over its own deadlines.

        Errors: ``BootFailedError``; ``InstanceFailedError`` where the server ended without a word.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise InstanceFailedError(f"the server ended before it was ready, {ending(code)}")
        error = msgspec.json.decode(line, type=_Word).error
        if error is None:
            return msgspec.json.decode(line, type=InstanceFacts)
        raise BootFailedError(error, self._process.wait())

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Whether the server's process has ended, or does in that time."""
        return wait_ended(self._pidfd, timeout_s)

    def failure(self) -> TandemError:
        """Return the error for a server that ended by itself."""
        return InstanceFailedError(f"the server has ended, {ending(self._process.wait())}")

    def stop(self) -> None:
        """End the server: in order within ``STOP_S``, else by force. Doing it twice does nothing more."""
        if self._pidfd < 0:
            return
        try:
            self._process.terminate()
            if not self.ended(STOP_S):
                self._kill()
        except BaseException:
            self._kill()  # A second Ctrl-C: the user does not want to wait.
            raise
        finally:
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                assert pipe is not None
                pipe.close()
            os.close(self._pidfd)
            self._pidfd = -1

    def _kill(self) -> None:
        try:
            # Ranks that the launcher put in the server's group go with it, others with their parent.
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # It has ended meanwhile.


def ending(code: int) -> str:
    """Return an exit status of ``subprocess`` in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def end_with(fd: int) -> None:
    """Have SIGTERM sent to this process when the other end of the pipe ``fd`` is closed.

    A pipe and not PDEATHSIG: that one fires when the *thread* that started this process ends. The reader
    is a daemon thread, so that it works from the first moment of a boot, before any event loop.
    """

    def watch() -> None:
        while os.read(fd, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()
