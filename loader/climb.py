"""How many threads read, and how much at once: found while reading, by what the drive gives.

Drives differ by more than any default allows: one gives most to a single reader and half of that to 32,
another needs 32. So a load changes one thing at a time and keeps what gave more bytes a second.
"""

from collections.abc import Iterator
from typing import Final

import msgspec

MOST_THREADS: Final = 32
LEAST_BLOCK_BYTES: Final = 4 << 20
MOST_BLOCK_BYTES: Final = 16 << 20
RING_BYTES: Final = 256 << 20
"""Most bytes of all threads' blocks together."""

SETTLE_S: Final = 0.1
"""After a change, before bytes count again: what is under way was asked for before it."""
WINDOW_S: Final = 0.2
_BETTER: Final = 1.04
"""A change must give so many times as much. Windows differ by a few per cent on a quiet machine."""
_WORSE: Final = 0.7
"""Below this part of what was found, the drive has changed and is searched again."""


class Setting(msgspec.Struct, frozen=True):
    """What is tried."""

    threads: int
    block_bytes: int


class Climb:
    """A hill climb over threads and block bytes, each doubled or halved. No clock, no threads."""

    def __init__(self, threads: int, most_threads: int = MOST_THREADS) -> None:
        self._most_threads = most_threads
        self.setting = Setting(max(1, min(threads, most_threads)), LEAST_BLOCK_BYTES)
        """What to read with now."""
        self._best, self._best_rate = self.setting, 0.0
        self._trials: Iterator[Setting] = iter(())

    def observe(self, rate: float) -> None:
        """Take what ``setting`` gave, in bytes a second, and choose what is tried next."""
        if self.setting == self._best:
            # At the start, or the search is over and this is what was kept.
            if rate > self._best_rate * _WORSE and self._best_rate:
                return
            self._best_rate = rate
            self._trials = self._neighbours(None)
        elif rate > self._best_rate * _BETTER:
            last, self._best, self._best_rate = self._best, self.setting, rate
            self._trials = self._neighbours(last)
        self.setting = next(self._trials, self._best)

    def _neighbours(self, last: Setting | None) -> Iterator[Setting]:
        """Yield what to try next to the best; first on from ``last``, and never back to it."""
        best = self._best
        steps = [(2.0, 1.0), (0.5, 1.0), (1.0, 2.0), (1.0, 0.5)]
        if last is not None:
            onward = (best.threads / last.threads, best.block_bytes / last.block_bytes)
            steps = sorted(steps, key=lambda step: step != onward)
        for threads, block in steps:
            found = Setting(
                min(max(1, int(best.threads * threads)), self._most_threads), int(best.block_bytes * block)
            )
            if found not in (best, last) and self._is_allowed(found):
                yield found

    def _is_allowed(self, setting: Setting) -> bool:
        return (
            LEAST_BLOCK_BYTES <= setting.block_bytes <= MOST_BLOCK_BYTES
            and setting.threads * setting.block_bytes <= RING_BYTES
        )


class Meter:
    """Turns counted bytes into rates for a climb. The caller's lock guards it."""

    def __init__(self, climb: Climb, now_s: float) -> None:
        self._climb = climb
        self._bytes = 0
        self._began_s = now_s

    def add(self, count: int, now_s: float) -> bool:
        """Count bytes that are there now; return whether the setting has changed."""
        if now_s < self._began_s:
            return False
        self._bytes += count
        spent_s = now_s - self._began_s
        if spent_s < WINDOW_S:
            return False
        before = self._climb.setting
        self._climb.observe(self._bytes / spent_s)
        changed = self._climb.setting != before
        self._bytes, self._began_s = 0, now_s + (SETTLE_S if changed else 0.0)
        return changed
