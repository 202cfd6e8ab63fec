"""A worker does not outlive the orchestrator that started it."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


class ParentDiedError(Exception):
    """The process that started this one is gone."""


class Parent:
    """The orchestrator as its worker sees it.

    ``pid`` is what it said it is: who asks the kernel alone takes the process that orphans are given to
    for a parent that lives. The kernel kills this process when its parent ends (PDEATHSIG). That misses a
    worker started from a thread that lives on; ``fd``, readable from the parent's end, catches that at the
    next wait.
    """

    def __init__(self, pid: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, f"prctl(PR_SET_PDEATHSIG): {os.strerror(errno)}")
        if os.getppid() != pid:
            raise ParentDiedError  # It ended before the call above.
        try:
            self.fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise ParentDiedError from None
