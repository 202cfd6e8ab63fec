"""One checkpoint file, open for reading, and whether a part of it is in the page cache.

Bytes that are in the page cache (or on tmpfs) are read from there; those that are not are read past it,
where the file system takes that: the cache's bookkeeping is spared, and nothing is evicted.
"""

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np

from loader.index import open_regular

PAGE: Final = mmap.PAGESIZE
DIRECT_ALIGNMENT: Final = 4096
"""What offsets, lengths and memory of a read past the cache are multiples of: no drive asks for more."""
_ZONE_BYTES: Final = 16 << 20
_SAMPLES: Final = 8
"""Pages looked at in a zone. Caches keep and lose files by long runs."""


class Source:
    """Owner of a file's descriptors. Shared by reader threads; ``close`` when they have ended.

    Errors: those of ``open_regular``.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = open_regular(path)
        self._others: list[int] = []
        self.direct_fd: int | None = None
        """For reads past the page cache; None where the file system has none."""
        self._residency: _Residency | None = None
        self._size = os.fstat(self.fd).st_size
        self._zones: dict[int, bool] = {}
        try:
            self.direct_fd = self._again(os.O_DIRECT)
            self._is_cached = self._prober()
        except BaseException:
            self.close()
            raise

    def is_cached(self, offset: int) -> bool:
        """Return whether a byte is in the page cache, by some pages around it; also where nobody can tell.

        What was found of a zone of the file is kept: small reads are many, and loads are short.
        """
        zone = offset // _ZONE_BYTES
        known = self._zones.get(zone)
        if known is None:
            start = zone * _ZONE_BYTES
            known = self._zones[zone] = self._looks_cached(start, min(_ZONE_BYTES, self._size - start))
        return known

    def _looks_cached(self, offset: int, length: int) -> bool:
        first, last = offset // PAGE, (offset + length - 1) // PAGE
        steps = min(_SAMPLES, last - first + 1)
        # Some page of each part, not always the same ones: looking may itself bring a page in.
        edges = [first + (last + 1 - first) * step // steps for step in range(steps + 1)]
        pages = (random.randrange(start, stop) for start, stop in pairwise(edges))  # noqa: S311
        return all(self._is_cached(page * PAGE) for page in pages)

    def refuse_direct(self) -> None:
        """Note that reads past the cache do not work after all."""
        self.direct_fd = None  # the descriptor stays open: another thread may be reading from it

    def close(self) -> None:
        """Close the file."""
        if self._residency is not None:
            self._residency.close()
        for fd in (self.fd, *self._others):
            os.close(fd)

    def _again(self, flags: int) -> int | None:
        try:
            # The same file, whatever the path has become since.
            fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError:
            return None
        self._others.append(fd)
        return fd

    def _prober(self) -> Callable[[int], bool]:
        """Return what says of one page, by its first byte, whether it is cached."""
        if os.geteuid() in (0, os.fstat(self.fd).st_uid) or os.access(self.path, os.W_OK):
            self._residency = _Residency(self.fd, self._size)
            return self._residency.covers
        # Of another's file the kernel says that all is there; but it reads at once only what really is.
        probe_fd = self._again(0)
        if probe_fd is None:
            return lambda _offset: True
        os.posix_fadvise(probe_fd, 0, 0, os.POSIX_FADV_RANDOM)  # a page that is not there brings no others
        return lambda offset: _is_read_at_once(probe_fd, offset)


class _Residency:
    """Asks ``mincore`` of pages of a mapping that is never touched."""

    def __init__(self, fd: int, size: int) -> None:
        self._mapping = mmap.mmap(fd, size, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, np.uint8).ctypes.data
        self._size = size
        self._mincore = ctypes.CDLL(None).mincore
        self._mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

    def covers(self, offset: int) -> bool:
        """Return whether the page that begins at ``offset`` is in the page cache."""
        if offset >= self._size:
            return True
        state = ctypes.create_string_buffer(1)
        if self._mincore(self._address + offset, 1, state):
            return True
        return bool(state.raw[0] & 1)

    def close(self) -> None:
        """Unmap the file; nobody asks any more."""
        self._mapping.close()


def _is_read_at_once(fd: int, offset: int) -> bool:
    try:
        os.preadv(fd, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EAGAIN
    return True
