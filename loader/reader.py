"""A rank's part of a load plan, executed by a few threads with preadv."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from loader.index import FileEntry, open_regular
from loader.place import Destination, HostDestination, damaged_scales
from loader.plan import LoadPlan, Read
from protocol.errors import ModelFormatError, StorageError

DEFAULT_THREADS: Final = 2
_MAX_VECTORS: Final = 1024
"""IOV_MAX of Linux."""

ProgressCallback = Callable[[int], None]
"""Called with the bytes this rank has read so far; from any reader thread, one call at a time."""


class LoadReport(msgspec.Struct, frozen=True):
    """What one rank's load took."""

    bytes: int
    seconds: float
    """Wall time."""
    direct_bytes: int
    """Of those, read straight into an arena."""


def load(
    plan: LoadPlan,
    rank: int,
    arenas: Mapping[int, memoryview],
    threads: int = DEFAULT_THREADS,
    on_progress: ProgressCallback | None = None,
) -> LoadReport:
    """Read one rank's part of a plan into the arenas of all ranks that want it.

    ``arenas`` are writable buffers of at least ``plan.arena_bytes`` for every rank that the reads have
    pieces for (``arenas_written``). What no parameter covers (padding) is not touched.

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
    threads: int = DEFAULT_THREADS,
    on_progress: ProgressCallback | None = None,
) -> LoadReport:
    """Like ``load``, to any destination."""
    started = time.monotonic()
    job = _Job(plan, rank, destination, on_progress)
    try:
        job.run(max(1, min(threads, len(plan.reads[rank]))))
        job.check_unchanged()
    finally:
        job.close()
    return LoadReport(job.done_bytes, time.monotonic() - started, job.direct_bytes)


class _Job:
    """One load under way. Owns the descriptors; its counters change under its lock only."""

    def __init__(
        self, plan: LoadPlan, rank: int, destination: Destination, on_progress: ProgressCallback | None
    ) -> None:
        self.done_bytes = 0
        self.direct_bytes = 0
        self._plan = plan
        self._destination = destination
        self._on_progress = on_progress
        self._queue = deque(plan.reads[rank])
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._fds: dict[int, int] = {}
        try:
            for file in sorted({read.file for read in plan.reads[rank]}):
                self._fds[file] = open_regular(plan.files[file].path)
        except BaseException:
            self.close()
            raise

    def run(self, threads: int) -> None:
        """Read everything; all threads have ended when this returns or raises."""
        self.check_unchanged()
        workers = [
            threading.Thread(target=self._work, name=f"tandem-reader-{i}", daemon=True)
            for i in range(threads)
        ]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except BaseException:
            self._stop.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            raise
        if self._error is not None:
            raise self._error

    def check_unchanged(self) -> None:
        """Refuse files that are no longer those whose headers were read."""
        for file, fd in self._fds.items():
            entry, facts = self._plan.files[file], os.fstat(fd)
            if (facts.st_size, facts.st_mtime_ns) != (entry.size, entry.mtime_ns):
                raise StorageError(
                    f"{entry.path} changed while it was being loaded ({entry.size} bytes before, "
                    f"{facts.st_size} now): leave the model alone and start again",
                    field=entry.path,
                )

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _work(self) -> None:
        try:
            staging = self._destination.open()
            try:
                while not self._stop.is_set():
                    try:
                        read = self._queue.popleft()
                    except IndexError:
                        break
                    places = self._destination.direct(read)
                    if places is not None:
                        self._fill(read, places)
                        self._check_scales(read, places)
                    else:
                        block = staging.block(read.length)
                        self._fill(read, [block[: read.length]])
                        self._check_scales(read, [block[: read.length]])
                        staging.put(read, block)
                    self._count(read.length, places is not None)
            finally:
                staging.close()
        except BaseException as error:  # raised again by run(), in the thread that asked
            with self._lock:
                self._error = self._error or error
            self._stop.set()

    def _fill(self, read: Read, places: list[memoryview]) -> None:
        """Read into ``places``, one after another, until they are full."""
        fd, entry = self._fds[read.file], self._plan.files[read.file]
        done, at, vectors = 0, 0, list(places)
        while done < read.length:
            try:
                count = os.preadv(fd, vectors[at : at + _MAX_VECTORS], read.offset + done)
            except OSError as error:
                raise StorageError(
                    f"{entry.path}: tensor {_tensor_at(read, done)} cannot be read at byte "
                    f"{read.offset + done}: {error.strerror}",
                    field=_tensor_at(read, done),
                ) from error
            if count == 0:
                raise _truncated(entry, read, done)
            done += count
            while at < len(vectors) and count >= len(vectors[at]):
                count -= len(vectors[at])
                at += 1
            if count:
                vectors[at] = vectors[at][count:]

    def _check_scales(self, read: Read, places: list[memoryview]) -> None:
        """Refuse scales that are no numbers: every product with them would be none."""
        name = damaged_scales(read, places)
        if name is not None:
            raise ModelFormatError(
                f"{self._plan.files[read.file].path}: tensor {name} has scales that are not finite: the "
                "file is damaged, pull the model again",
                field=name,
            )

    def _count(self, length: int, is_direct: bool) -> None:
        with self._lock:
            self.done_bytes += length
            self.direct_bytes += length if is_direct else 0
            if self._on_progress is not None:
                self._on_progress(self.done_bytes)


def _truncated(entry: FileEntry, read: Read, done: int) -> ModelFormatError:
    name = _tensor_at(read, done)
    return ModelFormatError(
        f"{entry.path}: tensor {name} ends at byte {read.offset + done}, {read.length - done} bytes early: "
        "the file was truncated while it was being loaded, pull the model again",
        field=name,
    )


def _tensor_at(read: Read, done: int) -> str:
    before = [p.tensor for p in read.placements if p.source_offset <= done]
    return before[-1] if before else read.placements[0].tensor
