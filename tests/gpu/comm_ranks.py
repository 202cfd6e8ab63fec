"""Rank processes of the communicator's tests: start them, hear from them, leave none behind."""

import contextlib
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from protocol.abort_page import make_page
from protocol.topology import Topology

ARCHITECTURE = "sm_90a"
CONNECT_S = 60.0
LONGEST_BYTES = 64 << 20


class Ranks:
    """The processes of one instance, each running a function of a test module with its communicator."""

    def __init__(self, module: str, body: str, topology: Topology) -> None:
        from worker.backends.cuda.compiler import KernelCache

        self.directory = tempfile.TemporaryDirectory()
        KernelCache(Path(self.directory.name), ARCHITECTURE).load("collectives")
        self.page_fd = make_page()
        page = f"/proc/{os.getpid()}/fd/{self.page_fd}"
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(topology.world_size):
            ours, theirs = context.Pipe()
            work = (module, body, topology, rank, self.directory.name, page, theirs)
            process = context.Process(target=_run, args=work, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def hear(self, rank: int, timeout_s: float) -> Any:
        """Return what a rank sends next; raise its failure."""
        assert self.pipes[rank].poll(timeout_s), f"rank {rank} said nothing in {timeout_s} s"
        kind, value = self.pipes[rank].recv()
        assert kind == "value", f"rank {rank} failed:\n{value}"
        return value

    def kill(self, rank: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        for process in self.processes:
            process.join(5.0)
            if process.is_alive():
                process.kill()
                process.join(10.0)
            process.close()
        for pipe in self.pipes:
            pipe.close()
        os.close(self.page_fd)
        self.directory.cleanup()


@contextlib.contextmanager
def ranks(module: str, body: str, topology: Topology) -> Iterator[Ranks]:
    """Run ``body(communicator, pipe)`` on every rank; sooner or later all are gone."""
    started = Ranks(module, body, topology)
    try:
        yield started
    except BaseException:
        # The others of a rank that failed would wait for it.
        for process in started.processes:
            process.kill()
        raise
    finally:
        started.close()


def run_all(module: str, body: str, topology: Topology, timeout_s: float = 60.0) -> list[Any]:
    """Return what every rank's body returns."""
    with ranks(module, body, topology) as started:
        until_s = time.monotonic() + timeout_s
        found: dict[int, Any] = {}
        while len(found) < topology.world_size:
            waiting = {started.pipes[r]: r for r in range(topology.world_size) if r not in found}
            left_s = until_s - time.monotonic()
            ready = multiprocessing.connection.wait(list(waiting), max(left_s, 0.0))
            assert ready, f"ranks {sorted(waiting.values())} said nothing in {timeout_s} s"
            for pipe in ready:
                rank = next(r for p, r in waiting.items() if p is pipe)
                found[rank] = started.hear(rank, 0.0)
        return [found[rank] for rank in range(topology.world_size)]


def _run(
    module: str, body: str, topology: Topology, rank: int, directory: str, page: str, pipe: Connection
) -> None:
    try:
        import torch

        from worker.backends.cuda.comm import CudaCommunicator
        from worker.backends.cuda.compiler import KernelCache
        from worker.backends.cuda.launch import Kernels

        count = torch.cuda.device_count()
        torch.cuda.set_device(rank % count)
        torch.empty(1, device="cuda")
        kernels = Kernels(KernelCache(Path(directory), ARCHITECTURE))
        page_fd = os.open(page, os.O_RDWR)
        comm = CudaCommunicator.connect(
            topology,
            rank,
            f"{directory}/rendezvous",
            CONNECT_S,
            kernels,
            page_fd=page_fd,
            # NCCL wants a GPU for each rank; where there is one, long messages go its way.
            nccl_bytes=LONGEST_BYTES if count >= topology.world_size else 0,
        )
        os.close(page_fd)
        found = getattr(importlib.import_module(module), body)(comm, pipe)
        comm.close()
        pipe.send(("value", found))
    except BaseException:
        pipe.send(("failure", traceback.format_exc()))
        raise SystemExit(1) from None
