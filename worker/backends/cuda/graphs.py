"""Captured decode steps at a ladder of batch sizes, all in one memory pool."""

from collections.abc import Callable
from typing import Any

import torch

LADDER = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows; a step is padded to the next one. Beyond the last: multiples of ``STRIDE``."""
STRIDE = 64

Run = Callable[[int, bool], None]
"""Launches a decode step of so many rows; True: for rows that need more than the highest score."""


class DecodeGraphs:
    """Owner of the graphs, captured on the stream that is current.

    A size that is not captured is launched kernel by kernel.
    """

    def __init__(self, max_rows: int, run: Run) -> None:
        self._run = run
        self.sizes = ladder(max_rows)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def size_for(self, rows: int) -> int:
        """Return the least size that holds so many rows."""
        return next(size for size in self.sizes if size >= rows)

    def capture(self, prepare: Callable[[int], None]) -> None:
        """Capture every size, the largest first, so that the others fit into its memory.

        ``prepare`` brings the inputs of padded rows for a size.
        """
        for size in reversed(self.sizes):
            prepare(size)
            for is_full in (False, True):
                self._graphs[size, is_full] = self._captured(size, is_full)

    def run(self, size: int, is_full: bool) -> None:
        """Run a step whose inputs are on the device, on the current stream."""
        graph = self._graphs.get((size, is_full))
        if graph is None:
            self._run(size, is_full)
        else:
            graph.replay()

    def _captured(self, size: int, is_full: bool) -> torch.cuda.CUDAGraph:
        # What a size needs for the first time, a library's kernel or a workspace, is made outside.
        self._run(size, is_full)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Another thread may be waiting for an event meanwhile, which only a thread's own mode allows.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            self._run(size, is_full)
        finally:
            graph.capture_end()
        if self._pool is None:
            self._pool = graph.pool()
        return graph


def ladder(max_rows: int) -> tuple[int, ...]:
    """Return the captured sizes for at most so many rows."""
    beyond = range(LADDER[-1] + STRIDE, max_rows + STRIDE, STRIDE)
    below = [size for size in (*LADDER, *beyond) if size < max_rows]
    return (*below, max_rows)
