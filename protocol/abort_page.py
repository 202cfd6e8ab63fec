"""The abort page: memory that the orchestrator shares with GPU ranks, to end what waits on their devices.

Its first word is the abort word: once it is not 0, every kernel that waits for a peer gives up. What stands
behind it is the ranks' own (``worker/backends/cuda/comm_page.py``). Writing it takes a descriptor, no CUDA.
"""

import os

PAGE_BYTES = 16 << 10


def make_page() -> int:
    """Return the descriptor of a new page, for the ranks of one epoch to inherit. The caller closes it.

    It is a memfd, because the driver pins no page of a file on a disk. Errors: ``OSError``.
    """
    fd = os.memfd_create("tandem-abort-page", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, PAGE_BYTES)
    except OSError:
        os.close(fd)
        raise
    return fd


def write_abort(fd: int) -> None:
    """End the waiting of every kernel of the epoch."""
    os.pwrite(fd, (1).to_bytes(4, "little"), 0)
