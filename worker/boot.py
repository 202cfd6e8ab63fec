"""From a ``Boot`` message to a rank that can take steps.

The reader threads start before torch is imported; torch, the communicator and the layers come up
beside them, as the device has it. This module and what it imports at the top must stay free of torch.
"""

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loader.index import check_against, read_index
from loader.plan import LoadPlan, plan_load
from loader.reader import load
from models.layout import Arena, arena
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.control import Boot, FromWorker, Progress, Ready, Span
from protocol.errors import LayoutError, MemoryBudgetError, UnsupportedModelError
from worker.steps import StepRunner

if TYPE_CHECKING:
    from worker.comm import Communicator

PROGRESS_INTERVAL_S = 0.25

Send = Callable[[FromWorker], None]


@dataclass(frozen=True, slots=True)
class Booted:
    """A rank that can take steps, and the message that says so."""

    runner: StepRunner
    comm: "Communicator"
    ready: Ready


@dataclass(frozen=True, slots=True)
class BootWork:
    """What is there before a device comes in: the rest of the boot is its backend's."""

    boot: Boot
    spec: ModelSpec
    held: Arena
    stages: tuple[range, ...]
    memory: mmap.mmap
    """Where this rank's weights are being read to, in the arena's layout."""
    spans: "Spans"
    wait_loaded: Callable[[], None]
    """Returns when they are all there."""


class Spans:
    """Owner of a rank's part of the waterfall."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.found: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time a block."""
        began_s = time.monotonic()
        yield
        self.add(name, began_s, time.monotonic())

    def add(self, name: str, began_s: float, ended_s: float, size: int = 0) -> None:
        """Add what was timed elsewhere."""
        self.found.append(Span(self._rank, name, began_s, ended_s, size))


class Load:
    """One rank's part of the load, in a thread that starts the reader threads. ``join`` ends it."""

    def __init__(self, boot: Boot, plan: LoadPlan, arenas: dict[int, memoryview], send: Send) -> None:
        self._boot, self._plan, self._arenas, self._send = boot, plan, arenas, send
        self._total = plan.bytes_read(boot.rank)
        self._next_progress_s = 0.0
        self._error: BaseException | None = None
        self._ended_s = self._began_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tandem-load", daemon=True)
        self._thread.start()

    def join(self, spans: Spans) -> None:
        """Wait until this rank's bytes are in their places; raises what the load raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        spans.add("load", self._began_s, self._ended_s, self._total)

    def _run(self) -> None:
        try:
            load(
                self._plan,
                self._boot.rank,
                self._arenas,
                on_progress=self._progress,
            )
        except BaseException as error:  # raised again by join(), in the thread that asked
            self._error = error
        self._ended_s = time.monotonic()

    def _progress(self, done_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_progress_s or done_bytes == self._total:
            self._next_progress_s = now_s + PROGRESS_INTERVAL_S
            self._send(Progress(self._boot.epoch, self._boot.rank, "load", done_bytes, self._total))


def boot_rank(boot: Boot, send: Send) -> Booted:
    """Load, connect, build and warm up one rank. ``send`` may be called from another thread.

    Errors: any ``TandemError`` of the model, its bytes or its layout; what torch and sockets raise.
    """
    if boot.device != "cpu" and not boot.device.startswith("cuda:"):
        raise UnsupportedModelError(
            f"device {boot.device!r} has no backend here: ask for --devices cpu or cuda:0", field="devices"
        )
    spans = Spans(boot.rank)
    with spans.span("plan"):
        spec = load_spec(Path(boot.model_directory), boot.dtype, boot.kv_dtype)
        checkpoint = read_index(Path(boot.model_directory))
        check_against(spec, checkpoint)
        stages = tuple(range(first, end) for first, end in boot.stages)
        if len(stages) != boot.topology.pp:
            raise LayoutError(
                f"{len(stages)} stages were sent for a pipeline of {boot.topology.pp}", field="pp"
            )
        plan = plan_load(spec, checkpoint, boot.topology, stages, only=boot.rank)
        held = arena(spec, boot.topology, stages, boot.rank)
        memories = {rank: _map(boot, rank, plan.arena_bytes[rank]) for rank in range(len(boot.arena_fds))}
    reading = Load(boot, plan, {rank: memoryview(memory) for rank, memory in memories.items()}, send)
    work = BootWork(boot, spec, held, stages, memories[boot.rank], spans, lambda: reading.join(spans))
    if boot.device == "cpu":
        from worker.boot_cpu import boot_on_cpu

        return boot_on_cpu(work)
    from worker.backends.cuda.boot import boot_on_cuda

    return boot_on_cuda(work)


def _map(boot: Boot, rank: int, needed: int) -> mmap.mmap:
    fd = boot.arena_fds[rank]
    size = os.fstat(fd).st_size
    if size < needed:
        raise MemoryBudgetError(
            f"the arena of rank {rank} has {size} bytes, its weights take {needed}: the model changed "
            "after it was planned, start again",
            field="memory",
        )
    return mmap.mmap(fd, size)
