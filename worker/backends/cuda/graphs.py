"""Captured decode steps at a ladder of batch sizes, all in one memory pool."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from worker.backends.cuda.attention_paths import DecodeRule

LADDER = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Rows; a step is padded to the next one. Beyond the last: multiples of ``STRIDE``."""
STRIDE = 64
SHORT_LADDER = (1, 8, 64)
"""For ranks that share a GPU: their kernels wait for each other by turns, so that a step takes too long to
try many sizes, and padding costs next to nothing."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """What of a decode step is decided on the host, beside its size."""

    is_full: bool
    """Whether a row needs more than the highest score."""
    rules: tuple[DecodeRule, ...]
    """What attends, by KV group."""


Run = Callable[[int, StepKind], None]
"""Launches a decode step of so many rows."""


class DecodeGraphs:
    """Owner of the graphs, captured on the stream that is current.

    A size that is not captured is launched kernel by kernel.
    """

    def __init__(self, max_rows: int, run: Run, rungs: tuple[int, ...]) -> None:
        self._run = run
        self.sizes = ladder(max_rows, rungs)
        self._graphs: dict[tuple[int, StepKind], torch.cuda.CUDAGraph] = {}
        self.pool: Any = None
        """The memory of all of them; None before the first one."""

    def size_for(self, rows: int) -> int:
        """Return the least size that holds so many rows."""
        return next(size for size in self.sizes if size >= rows)

    def capture(self, size: int, kinds: Iterable[StepKind]) -> None:
        """Capture a size, whose inputs are there. The largest first: the others fit in its memory."""
        for kind in kinds:
            self._graphs[size, kind] = self._captured(size, kind)

    def run(self, size: int, kind: StepKind) -> None:
        """Run a step whose inputs are on the device, on the current stream."""
        graph = self._graphs.get((size, kind))
        if graph is None:
            self._run(size, kind)
        else:
            graph.replay()

    def _captured(self, size: int, kind: StepKind) -> torch.cuda.CUDAGraph:
        # What a size needs for the first time, a library's kernel or a workspace, is made outside.
        self._run(size, kind)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # Another thread may be waiting for an event meanwhile, which only a thread's own mode allows.
        graph.capture_begin(self.pool, capture_error_mode="thread_local")
        try:
            self._run(size, kind)
        finally:
            graph.capture_end()
        if self.pool is None:
            self.pool = graph.pool()
        return graph


def ladder(max_rows: int, rungs: tuple[int, ...]) -> tuple[int, ...]:
    """Return the captured sizes for at most so many rows."""
    beyond = range(rungs[-1] + STRIDE, max_rows + STRIDE, STRIDE)
    below = [size for size in (*rungs, *beyond) if size < max_rows]
    return (*below, max_rows)
