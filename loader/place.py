"""Bytes into arenas: conversion between dtypes and scattering, in numpy (no torch).

A ``Destination`` is where a load's bytes go. ``HostDestination`` writes into mapped host memory. One
that copies to a device holds pinned blocks and returns from ``put`` before a copy is done: the ring
of blocks is therefore its own, and ``close`` is the barrier.
"""

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from loader.plan import Placement, Read
from models.parameter import DTYPE_BYTES

Buffer = memoryview
Array = npt.NDArray[Any]

_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int32": np.dtype("<u4"),
    "float8_e4m3fn": np.dtype("u1"),
}
_CHUNK: Final = 64 << 10
"""Elements converted at a time, so that intermediate values stay in the cache."""
_QUIET: Final = 0x40
_EXPONENT: Final = 0x7F80
"""Of bfloat16: all its bits are set in infinities and NaN."""


class Staging(Protocol):
    """One reader thread's blocks on the way to a destination."""

    def block(self, length: int) -> Buffer:
        """Return a writable block of at least ``length`` bytes; waits until one is free.

        It begins at a page: what is read past the page cache must. The reader asks for no more than
        ``loader.climb.MOST_BLOCK_BYTES`` and two pages, and for the least of the climb at first.
        """

    def put(self, block: Buffer, reads: Sequence[tuple[int, Read]]) -> None:
        """Send what was read into ``block`` to its places. The block belongs to the staging again.

        ``reads``: each with its first byte in the block.
        """

    def close(self) -> None:
        """Return when all that was put is in its place."""


class Destination(Protocol):
    """Where a load's bytes go."""

    def direct(self, read: Read) -> list[Buffer] | None:
        """Return the places of a read's bytes, in order, or None where they must be staged."""

    def open(self) -> Staging:
        """Return the staging of one reader thread; its owner calls ``close``."""


class HostDestination:
    """Arenas that are mapped in this process. Shared by the reader threads; holds no changing state."""

    def __init__(self, arenas: Mapping[int, memoryview]) -> None:
        self._bytes = {rank: view.cast("B") for rank, view in arenas.items()}
        self._arrays = {rank: np.frombuffer(view, np.uint8) for rank, view in self._bytes.items()}

    def direct(self, read: Read) -> list[Buffer] | None:
        """Return arena slices where every byte goes unchanged to one place."""
        if not read.is_direct:
            return None
        return [
            self._bytes[p.rank][p.arena_offset : p.arena_offset + p.columns * DTYPE_BYTES[p.dtype]]
            for p in read.placements
        ]

    def open(self) -> "HostStaging":
        """Return one thread's staging."""
        return HostStaging(self._arrays)


class HostStaging:
    """One block, reused: a put is done when it returns. Owned by one reader thread."""

    def __init__(self, arenas: Mapping[int, Array]) -> None:
        self._arenas = arenas
        self._block = memoryview(bytearray())

    def block(self, length: int) -> Buffer:
        """Return the block, made longer where it has to be."""
        if len(self._block) < length:
            # Mapped, so that it begins at a page and goes back to the system; shared, so that it does not
            # count as the process's own memory, which is measured while a load is under way.
            self._block = memoryview(mmap.mmap(-1, length))
        return self._block

    def put(self, block: Buffer, reads: Sequence[tuple[int, Read]]) -> None:
        """Convert and scatter what was read."""
        source = np.frombuffer(block, np.uint8)
        for at, read in reads:
            own = source[at : at + read.length]
            for placement in read.placements:
                place(placement, own, self._arenas[placement.rank])

    def close(self) -> None:
        """Nothing is under way after ``put``."""


def place(placement: Placement, block: Array, arena: Array) -> None:
    """Write one placement's elements from a read's bytes into an arena's, converting the dtype.

    ``block`` and ``arena`` are uint8. Rounding is to nearest even; NaN stay NaN.
    """
    if placement.is_plain:
        size = placement.columns * DTYPE_BYTES[placement.dtype]
        source_at, arena_at = placement.source_offset, placement.arena_offset
        np.copyto(arena[arena_at : arena_at + size], block[source_at : source_at + size])
        return
    source = _matrix(
        block,
        placement.source_dtype,
        placement.rows,
        placement.columns,
        placement.source_offset,
        placement.source_stride,
    )
    target = _matrix(
        arena,
        placement.dtype,
        placement.rows,
        placement.columns,
        placement.arena_offset,
        placement.arena_stride,
    )
    convert(source, placement.source_dtype, target, placement.dtype)


def damaged_scales(read: Read, places: list[Buffer]) -> str | None:
    """Return the first tensor of scales that is not finite. ``places`` hold a read's bytes, in order.

    Done where bytes have just been read, by each reader thread: a pass over all scales after the load would
    take seconds of a boot (60 GB of Kimi K2.5).
    """
    is_direct = len(places) == len(read.placements) and read.is_direct
    for at, placement in enumerate(read.placements):
        if placement.is_scales:
            block = np.frombuffer(places[at] if is_direct else places[0], np.uint8)
            offset = 0 if is_direct else placement.source_offset
            found = _matrix(
                block,
                placement.source_dtype,
                placement.rows,
                placement.columns,
                offset,
                placement.source_stride,
            )
            if not _is_finite(found, placement.source_dtype):
                return placement.tensor
    return None


def _is_finite(values: Array, dtype: str) -> bool:
    if dtype == "bfloat16":
        return bool(((values & _EXPONENT) != _EXPONENT).all())
    return bool(np.isfinite(values).all())


def _matrix(flat: Array, dtype: str, rows: int, columns: int, offset: int, stride: int) -> Array:
    kind = _NUMPY[dtype]
    last = offset + (rows - 1) * (stride if rows > 1 else 0) + columns * kind.itemsize
    assert offset >= 0
    assert last <= len(flat), (offset, last, len(flat))
    return np.ndarray((rows, columns), kind, flat.data, offset, (stride, kind.itemsize))


def convert(source: Array, source_dtype: str, target: Array, dtype: str) -> None:
    """Copy a matrix into another of the same shape and of ``dtype``; bfloat16 is held as uint16."""
    if source_dtype == dtype:
        bits = np.dtype(f"<u{DTYPE_BYTES[dtype]}")
        np.copyto(target.view(bits), source.view(bits))
        return
    rows, columns = source.shape
    row_step, column_step = max(1, _CHUNK // columns), min(columns, _CHUNK)
    for row in range(0, rows, row_step):
        for column in range(0, columns, column_step):
            part = np.s_[row : row + row_step, column : column + column_step]
            _convert_chunk(source[part], source_dtype, target[part], dtype)


def _convert_chunk(source: Array, source_dtype: str, target: Array, dtype: str) -> None:
    if dtype == "float32":
        if source_dtype == "bfloat16":
            np.left_shift(source, 16, out=target.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(target, source)
        return
    assert dtype == "bfloat16", dtype
    values = source if source_dtype == "float32" else source.astype(np.float32)
    np.copyto(target, _round_to_bfloat16(values), casting="same_kind")


def _round_to_bfloat16(values: Array) -> Array:
    """Return the upper halves of float32 values, rounded to nearest even, as uint32."""
    bits = values.view(np.uint32)
    # (bits + 0x7FFF + (lowest kept bit)) >> 16, in place: this is what a conversion's speed hangs on.
    rounded: Array = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    is_nan = np.isnan(values)
    if is_nan.any():
        # Rounding could carry a NaN's mantissa into the sign; a payload in the lower half would be lost.
        rounded[is_nan] = (bits[is_nan] >> 16) | _QUIET
    return rounded
