"""A rank's part of a load plan, executed by a few threads with preadv.

Each thread takes reads that lie side by side, up to the block size of the moment, and reads them at
once: from the page cache where they are there, past it where they are not (``loader.source``). How many
threads and what block size is found while reading (``loader.climb``).
"""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from loader.climb import MOST_THREADS, Climb, Meter
from loader.index import FileEntry
from loader.place import Buffer, Destination, HostDestination, Staging, damaged_scales
from loader.plan import LoadPlan, Read
from loader.source import DIRECT_ALIGNMENT, Source
from protocol.errors import ModelFormatError, StorageError

_MAX_VECTORS: Final = 1024
"""IOV_MAX of Linux."""
_COLD_THREADS: Final = 4
"""To start with where a drive is read; from the page cache it is the processor's cores that copy."""
_WARM_THREADS: Final = 16

ProgressCallback = Callable[[int], None]
"""Called with the bytes this rank has read so far; from any reader thread, one call at a time."""


class LoadReport(msgspec.Struct, frozen=True):
    """What one rank's load took."""

    bytes: int
    seconds: float
    """Wall time."""
    direct_bytes: int
    """Of those, read straight into an arena."""
    uncached_bytes: int
    """Of those, read past the page cache."""
    threads: int
    """That read at the end."""
    block_bytes: int
    """Read at once at the end, at the most."""


def load(
    plan: LoadPlan,
    rank: int,
    arenas: Mapping[int, memoryview],
    threads: int = MOST_THREADS,
    on_progress: ProgressCallback | None = None,
) -> LoadReport:
    """Read one rank's part of a plan into the arenas of all ranks that want it.

    ``arenas`` are writable buffers of at least ``plan.arena_bytes`` for every rank that the reads have
    pieces for (``arenas_written``). What no parameter covers (padding) is not touched. ``threads``: the
    most that read.

    Errors: ``StorageError`` where a file cannot be read or is not the one that was planned for,
    ``ModelFormatError`` where it ends early or has scales that are not finite; both name file and tensor.
    """
    for needed in sorted(arenas_written(plan, rank)):
        size = len(arenas[needed].cast("B"))
        assert size >= plan.arena_bytes[needed], (needed, size, plan.arena_bytes[needed])
    return load_to(plan, rank, HostDestination(arenas), threads, on_progress)


def arenas_written(plan: LoadPlan, rank: int) -> set[int]:
    """Return the ranks whose arenas one rank writes to."""
    return {p.rank for read in plan.reads[rank] for p in read.placements}


def load_to(
    plan: LoadPlan,
    rank: int,
    destination: Destination,
    threads: int = MOST_THREADS,
    on_progress: ProgressCallback | None = None,
) -> LoadReport:
    """Like ``load``, to any destination."""
    started = time.monotonic()
    job = _Job(plan, rank, destination, max(1, min(threads, len(plan.reads[rank]))), on_progress)
    try:
        job.run()
        job.check_unchanged()
    finally:
        job.close()
    return job.report(time.monotonic() - started)


class _Job:
    """One load under way. Owns the files and threads; what changes does so under its lock only."""

    def __init__(
        self,
        plan: LoadPlan,
        rank: int,
        destination: Destination,
        most_threads: int,
        on_progress: ProgressCallback | None,
    ) -> None:
        self._plan = plan
        self._destination = destination
        self._on_progress = on_progress
        self._queue = deque(plan.reads[rank])
        self._done_bytes = self._direct_bytes = self._uncached_bytes = 0
        self._changed = threading.Condition()
        """Guards everything below it; notified where a thread that has no turn may have one, or may end."""
        self._stopped = False
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self._sources: dict[int, Source] = {}
        try:
            for file in sorted({read.file for read in plan.reads[rank]}):
                self._sources[file] = Source(plan.files[file].path)
        except BaseException:
            self.close()
            raise
        self._climb = Climb(self._first_threads(), most_threads)
        self._meter = Meter(self._climb, time.monotonic())

    def run(self) -> None:
        """Read everything; all threads have ended when this returns or raises."""
        self.check_unchanged()
        try:
            with self._changed:
                self._start_threads()
            self._join()
        except BaseException:
            self._stop(None)
            self._join()
            raise
        if self._error is not None:
            raise self._error

    def check_unchanged(self) -> None:
        """Refuse files that are no longer those whose headers were read."""
        for file, source in self._sources.items():
            entry, facts = self._plan.files[file], os.fstat(source.fd)
            if (facts.st_size, facts.st_mtime_ns) != (entry.size, entry.mtime_ns):
                raise StorageError(
                    f"{entry.path} changed while it was being loaded ({entry.size} bytes before, "
                    f"{facts.st_size} now): leave the model alone and start again",
                    field=entry.path,
                )

    def report(self, seconds: float) -> LoadReport:
        """Return what was done."""
        setting = self._climb.setting
        return LoadReport(
            self._done_bytes,
            seconds,
            self._direct_bytes,
            self._uncached_bytes,
            setting.threads,
            setting.block_bytes,
        )

    def close(self) -> None:
        """Close the files."""
        while self._sources:
            self._sources.popitem()[1].close()

    def _first_threads(self) -> int:
        if not self._queue:
            return 1
        first = self._queue[0]
        if not self._sources[first.file].is_cached(first.offset):
            return _COLD_THREADS
        # One core is left to what comes up beside the reading.
        return min(max(2, len(os.sched_getaffinity(0)) - 1), _WARM_THREADS)

    def _start_threads(self) -> None:
        while len(self._threads) < self._climb.setting.threads:
            index = len(self._threads)
            thread = threading.Thread(
                target=self._work, args=(index,), name=f"tandem-reader-{index}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _join(self) -> None:
        # The list grows while it is gone through, but only by threads that are waited for before its end.
        for thread in self._threads:
            thread.join()

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._error = self._error or error
            self._stopped = True
            self._changed.notify_all()

    def _work(self, index: int) -> None:
        try:
            staging = self._destination.open()
            try:
                while reads := self._claim(index):
                    self._count(reads, self._read(reads, staging))
            finally:
                staging.close()
        except BaseException as error:  # raised again by run(), in the thread that asked
            self._stop(error)

    def _claim(self, index: int) -> list[Read]:
        """Return neighbours to read at once, when it is this thread's turn; nothing where all is taken."""
        with self._changed:
            while self._queue and not self._stopped and index >= self._climb.setting.threads:
                self._changed.wait()
            if self._stopped or not self._queue:
                return []
            reads = [self._queue.popleft()]
            length, is_direct = reads[0].length, reads[0].is_direct
            while self._queue:
                last, found = reads[-1], self._queue[0]
                length += found.length
                if (
                    found.file != last.file
                    or found.offset != last.offset + last.length
                    or length > self._climb.setting.block_bytes
                    or found.is_direct != is_direct
                ):
                    break
                reads.append(self._queue.popleft())
            if not self._queue:
                self._changed.notify_all()
            return reads

    def _read(self, reads: list[Read], staging: Staging) -> tuple[bool, bool]:
        """Read neighbours into their places; return whether straight there, and whether past the cache."""
        first = reads[0]
        source, offset = self._sources[first.file], first.offset
        length = reads[-1].offset + reads[-1].length - offset
        direct_fd = source.direct_fd
        if direct_fd is not None and not source.is_cached(offset):
            skipped = offset % DIRECT_ALIGNMENT
            block = staging.block(-(-(skipped + length) // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT)
            if self._fill_uncached(source, direct_fd, block, reads, skipped, length):
                self._put(block, reads, skipped, staging)
                return False, True
            self._fill(source, reads, [block[skipped : skipped + length]])
            self._put(block, reads, skipped, staging)
            return False, False
        places = [self._destination.direct(read) for read in reads]
        known = [place for place in places if place is not None]
        if len(known) == len(places):
            self._fill(source, reads, [one for place in known for one in place])
            for read, place in zip(reads, known, strict=True):
                self._check_scales(read, place)
            return True, False
        block = staging.block(length)
        self._fill(source, reads, [block[:length]])
        self._put(block, reads, 0, staging)
        return False, False

    def _put(self, block: Buffer, reads: list[Read], skipped: int, staging: Staging) -> None:
        begin = reads[0].offset - skipped
        placed = [(read.offset - begin, read) for read in reads]
        for at, read in placed:
            self._check_scales(read, [block[at : at + read.length]])
        staging.put(block, placed)

    def _fill(self, source: Source, reads: list[Read], places: list[Buffer]) -> None:
        """Read neighbours into ``places``, one after another, until they are full."""
        offset = reads[0].offset
        length = reads[-1].offset + reads[-1].length - offset
        done, at, vectors = 0, 0, list(places)
        while done < length:
            try:
                count = os.preadv(source.fd, vectors[at : at + _MAX_VECTORS], offset + done)
            except OSError as error:
                raise self._unreadable(reads, done, error) from error
            if count == 0:
                raise self._truncated(reads, done)
            done += count
            while at < len(vectors) and count >= len(vectors[at]):
                count -= len(vectors[at])
                at += 1
            if count:
                vectors[at] = vectors[at][count:]

    def _fill_uncached(
        self, source: Source, fd: int, block: Buffer, reads: list[Read], skipped: int, length: int
    ) -> bool:
        """Read whole pages that hold neighbours; return False where the file system does not take that.

        ``skipped``: bytes of the block before the first read's.
        """
        begin, done, wanted = reads[0].offset - skipped, 0, skipped + length
        size = -(-wanted // DIRECT_ALIGNMENT) * DIRECT_ALIGNMENT
        while done < wanted:
            try:
                count = os.preadv(fd, [block[done:size]], begin + done)
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    source.refuse_direct()
                    return False
                raise self._unreadable(reads, done - skipped, error) from error
            if done + count < wanted:
                # Short: by the file's end, or at a border from which whole pages can be asked again.
                count -= count % DIRECT_ALIGNMENT
                if count == 0:
                    raise self._truncated(reads, max(0, done - skipped))
            done += count
        return True

    def _check_scales(self, read: Read, places: list[Buffer]) -> None:
        """Refuse scales that are no numbers: every product with them would be none."""
        name = damaged_scales(read, places)
        if name is not None:
            raise ModelFormatError(
                f"{self._plan.files[read.file].path}: tensor {name} has scales that are not finite: the "
                "file is damaged, pull the model again",
                field=name,
            )

    def _count(self, reads: list[Read], how: tuple[bool, bool]) -> None:
        length, (is_direct, is_uncached) = sum(read.length for read in reads), how
        with self._changed:
            self._done_bytes += length
            self._direct_bytes += length if is_direct else 0
            self._uncached_bytes += length if is_uncached else 0
            if self._on_progress is not None:
                self._on_progress(self._done_bytes)
            if self._queue and self._meter.add(length, time.monotonic()):
                self._start_threads()
                self._changed.notify_all()

    def _unreadable(self, reads: list[Read], done: int, error: OSError) -> StorageError:
        entry, name = self._at(reads, done)
        return StorageError(
            f"{entry.path}: tensor {name} cannot be read at byte {reads[0].offset + max(0, done)}: "
            f"{error.strerror}",
            field=name,
        )

    def _truncated(self, reads: list[Read], done: int) -> ModelFormatError:
        entry, name = self._at(reads, done)
        at, end = reads[0].offset + done, reads[-1].offset + reads[-1].length
        return ModelFormatError(
            f"{entry.path}: tensor {name} ends at byte {at}, {end - at} bytes early: "
            "the file was truncated while it was being loaded, pull the model again",
            field=name,
        )

    def _at(self, reads: list[Read], done: int) -> tuple[FileEntry, str]:
        """Return the file, and the tensor that holds the byte ``done`` bytes behind the first."""
        offset = reads[0].offset + max(0, done)
        read = [read for read in reads if read.offset <= offset][-1]
        before = [p.tensor for p in read.placements if p.source_offset <= offset - read.offset]
        return self._plan.files[read.file], before[-1] if before else read.placements[0].tensor
