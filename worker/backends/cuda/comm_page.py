"""A page of host memory that every rank of an instance maps, and each GPU reads.

It is the supervisor's (``protocol/abort_page.py``): whoever writes its first word ends every kernel that
waits for a peer. Behind that each rank has a record: what its kernels gave up on, that it has left, and the
counters by which hosts meet without the device.
"""

import ctypes
import mmap
import time
from collections.abc import Callable, Sequence
from enum import IntEnum

from cuda.bindings import driver

from protocol.abort_page import PAGE_BYTES
from worker.backends.cuda.driver import check
from worker.comm_group import CollectiveError

_RECORD_WORDS = 64  # as in collectives.cu, and so are the first four words of a record
MOST_RANKS = PAGE_BYTES // (4 * _RECORD_WORDS) - 1

_REASON, _OPERATION, _PEER, _LEFT, _BARRIERS, _DEALS = range(6)
_COUNTS, _MOST_COUNTS = 16, 8  # two rows of counts, by parity
_ABORTED, _LATE, _PEER_LEFT = 1, 2, 3
_LONGEST_NAP_S = 0.001


class DeviceOperation(IntEnum):
    """What a rank's kernels wait for, as they tell it in the page."""

    ALL_REDUCE = 1
    ALL_REDUCE_NORM = 2
    ALL_GATHER = 3
    REDUCE_SCATTER = 4
    ALL_TO_ALL = 5
    TO_NEXT_STAGE = 6
    FROM_PREVIOUS_STAGE = 7
    TOKENS_TO_FIRST_STAGE = 8
    TOKENS_FROM_LAST_STAGE = 9
    MERGE_PARTS = 10

    @property
    def label(self) -> str:
        """Return its name as the interface spells it."""
        return self.name.lower()


class Page:
    """One rank's mapping of the page, registered with its GPU. Needs a current context."""

    def __init__(self, fd: int, rank: int, world_size: int, timeout_s: float) -> None:
        """``timeout_s`` bounds the waits of the host. Errors: ``CudaError``."""
        assert world_size <= MOST_RANKS
        self._rank, self._world, self._timeout_s = rank, range(world_size), timeout_s
        self._map = mmap.mmap(fd, PAGE_BYTES)
        self._words = memoryview(self._map).cast("I")
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        del anchor  # the mapping stays until ``close``; an anchor kept would forbid that
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        check(driver.cuMemHostRegister(self._address, PAGE_BYTES, flags), "registering the abort page")
        found = check(driver.cuMemHostGetDevicePointer(self._address, 0), "the abort page's address")
        self.device_address = int(found)

    @property
    def is_aborted(self) -> bool:
        """Whether the abort word is written."""
        return self._words[0] != 0

    def error(self) -> CollectiveError | None:
        """Return what this rank's kernels gave up on, or that the instance was ended."""
        reason = self._read(self._rank, _REASON)
        others = [r for r in self._world if r != self._rank]
        if not reason:
            if not self.is_aborted:
                return None
            return CollectiveError(self._rank, "step", others, "the supervisor ended the instance")
        label = DeviceOperation(self._read(self._rank, _OPERATION)).label
        peer = self._read(self._rank, _PEER)
        return CollectiveError(self._rank, label, [peer], self._reasons()[reason])

    def barrier(self) -> None:
        """Return when the host of every rank is here. Errors: ``CollectiveError``."""
        number = (self._read(self._rank, _BARRIERS) + 1) & 0xFFFFFFFF
        self._write(self._rank, _BARRIERS, number)
        self._wait("barrier", self._world, lambda peer: _has_reached(self._read(peer, _BARRIERS), number))

    def deal(self, group: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Return the counts that every rank of the group came with. Errors: ``CollectiveError``."""
        assert len(counts) <= _MOST_COUNTS
        number = (self._read(self._rank, _DEALS) + 1) & 0xFFFFFFFF
        # A peer that has published its next counts has read these: two rows are enough.
        row = _COUNTS + (number & 1) * _MOST_COUNTS
        for index, count in enumerate(counts):
            self._write(self._rank, row + index, count)
        self._write(self._rank, _DEALS, number)
        self._wait("all_to_all", group, lambda peer: _has_reached(self._read(peer, _DEALS), number))
        return [[self._read(peer, row + index) for index in range(len(counts))] for peer in group]

    def leave(self, patience_s: float) -> None:
        """Say that this rank has left; wait up to ``patience_s`` for the others to say so."""
        self._write(self._rank, _LEFT, 1)
        until_s = time.monotonic() + patience_s
        while not all(self._read(peer, _LEFT) for peer in self._world) and time.monotonic() < until_s:
            time.sleep(_LONGEST_NAP_S)

    def close(self) -> None:
        """Unregister and unmap."""
        check(driver.cuMemHostUnregister(self._address), "unregistering the abort page")
        self._words.release()
        self._map.close()

    def _wait(self, operation: str, peers: Sequence[int], is_here: Callable[[int], bool]) -> None:
        until_s = time.monotonic() + self._timeout_s
        nap_s = 0.00005
        while missing := [peer for peer in peers if peer != self._rank and not is_here(peer)]:
            if self.is_aborted:
                reason = _ABORTED
            elif any(self._read(peer, _LEFT) and not is_here(peer) for peer in missing):
                reason = _PEER_LEFT
            elif time.monotonic() > until_s:
                reason = _LATE
            else:
                time.sleep(nap_s)
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)
                continue
            raise CollectiveError(self._rank, operation, missing, self._reasons()[reason])

    def _reasons(self) -> dict[int, str]:
        late = (
            f"it did not come within the deadline ({self._timeout_s:g} s): it hangs, or runs another plan"
        )
        return {
            _ABORTED: "the supervisor ended the instance",
            _LATE: late,
            _PEER_LEFT: "it has left: its own last words say why",
        }

    def _read(self, rank: int, word: int) -> int:
        return self._words[(1 + rank) * _RECORD_WORDS + word]

    def _write(self, rank: int, word: int, value: int) -> None:
        self._words[(1 + rank) * _RECORD_WORDS + word] = value


def _has_reached(count: int, number: int) -> bool:
    return (count - number) & 0xFFFFFFFF < 1 << 31
