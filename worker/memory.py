"""What a rank's memory really is, line by line of the plan in ``models/memory.py``.

A peak is the kernel's high-water mark, set back before and read after. Weights and KV are shared
memory and counted by their size; everything else is the process's own resident memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocol.control import MeasuredLine

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def _status() -> dict[str, int]:
    found = {}
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) << 10
    return found


def own_bytes() -> int:
    """Return the process's resident memory but for shared mappings (arenas and KV)."""
    status = _status()
    return status["RssAnon"] + status["RssFile"]


def _peak(work: Callable[[], T]) -> tuple[T, int | None]:
    """Do some work; return what it does, and its peak in bytes where the kernel lets us measure."""
    before = own_bytes()
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return work(), None
    result = work()
    status = _status()
    # Shared pages that the work touched for the first time are in the mark and not in the line.
    return result, status["VmHWM"] - status.get("RssShmem", 0) - before


class MemoryMeter:
    """Owner of a rank's measured lines. A line that the kernel does not let us measure stays out."""

    def __init__(self) -> None:
        self._lines: dict[str, int] = {}

    def add(self, name: str, size: int) -> None:
        """Add to a line."""
        self._lines[name] = self._lines.get(name, 0) + max(size, 0)

    def peak(self, name: str, work: Callable[[], T]) -> T:
        """Do some work and add what it took at its peak to a line."""
        result, size = _peak(work)
        if size is not None:
            self.add(name, size)
        return result

    def peak_at(self, name: str, units: int, work: Callable[[int], T], done_units: int) -> tuple[T, T]:
        """Add the peak that work of ``units`` would have, from work of one unit and of ``done_units``.

        The peak is taken to grow by the unit, from what any amount of work takes. Returns what the two do.
        """
        least, one = _peak(lambda: work(1))
        most, size = _peak(lambda: work(done_units))
        if one is not None and size is not None:
            per_unit = max(size - one, 0) / max(done_units - 1, 1)
            self.add(name, round(size + per_unit * (units - done_units)))
        return least, most

    def growth(self, name: str, work: Callable[[], T]) -> T:
        """Do some work and add what it left allocated to a line."""
        before = own_bytes()
        result = work()
        self.add(name, own_bytes() - before)
        return result

    def lines(self) -> list[MeasuredLine]:
        """Return what was measured."""
        return [MeasuredLine(name, size) for name, size in self._lines.items()]
