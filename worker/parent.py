"""A worker does not outlive the orchestrator that started it."""

import ctypes
import os
import select
import signal

_PR_SET_PDEATHSIG = 1


class ParentDiedError(Exception):
    """The process that started this one is gone."""


class Parent:
    """The orchestrator as its worker sees it.

    The kernel kills this process when its parent ends (PDEATHSIG). That misses a parent that ended
    before the call, and a worker started from a thread that lives on; ``fd``, readable from the
    parent's end, catches those at the next wait.
    """

    def __init__(self) -> None:
        parent = os.getppid()
        try:
            self.fd = os.pidfd_open(parent)
        except ProcessLookupError:
            raise ParentDiedError from None
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
        if os.getppid() != parent or self.is_gone():
            raise ParentDiedError

    def is_gone(self) -> bool:
        """Whether the parent has ended."""
        return bool(select.select([self.fd], [], [], 0)[0])
