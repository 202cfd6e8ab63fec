"""Where ranks run. Local processes; another placement is another ``Launcher``."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from protocol.errors import InstanceFailedError

WORKER_COMMAND = (sys.executable, "-P", "-m", "worker")
KEPT_VARIABLES = (
    *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPATH", "PYTHONWARNINGS", "VIRTUAL_ENV"),
    *("XDG_CACHE_HOME", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NCCL_NVLS_ENABLE"),
)
"""What a rank may see of its user's environment."""


@dataclass(frozen=True, slots=True)
class LaunchOrder:
    """The ranks of one epoch, as processes."""

    address: str
    """Where they connect to."""
    epoch: int
    world_size: int
    inherited_fds: tuple[int, ...]
    """Descriptors that every rank finds open under the same numbers."""
    environment: Mapping[str, str]


def rank_environment(environment: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment of a rank with so many compute threads."""
    kept = {name: environment[name] for name in KEPT_VARIABLES if name in environment}
    # A thread that waits at a barrier gives its core away after a moment: to spin for as long as OpenMP
    # does by itself makes every step twice as long where other work wants the cores, and not to spin at all
    # costs an eighth on a quiet machine (docs/decisions.md).
    # Multicast is for those who ask for it: where a machine offers it and cannot do it, it fails late.
    return (
        {"NCCL_NVLS_ENABLE": "0"}
        | kept
        | {
            "OMP_NUM_THREADS": str(threads),
            "GOMP_SPINCOUNT": "20000",
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # A quarter of what NCCL's buffers take by themselves.
            "NCCL_BUFFSIZE": "1048576",
            # A step's tensors then fit in the memory of the largest step, whatever their sizes: in pieces
            # of fixed sizes they do not always, and a device that KV has filled has no more to give.
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }
    )


class RankProcess(Protocol):
    """One or more ranks that live and die together. Its supervisor is the one who reaps it."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks in this process."""

    @property
    def pid(self) -> int:
        """Process id."""

    @property
    def pidfd(self) -> int:
        """A descriptor that becomes readable when the process ends."""

    @property
    def output_fd(self) -> int:
        """The non-blocking end of a pipe that holds what the process writes to standard error."""

    def is_stopped(self) -> bool:
        """Whether it is stopped by a signal or a debugger. Costs a system call or two."""

    def reap(self) -> int | None:
        """Return the exit status (negative: the signal), once it has ended; None before."""

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""

    def close(self) -> None:
        """Close the descriptors."""


class Launcher(Protocol):
    """Starts ranks."""

    def launch(self, order: LaunchOrder) -> Sequence[RankProcess]:
        """Start all ranks, or none: what was started before an error is ended again."""


class LocalProcess:
    """A child of this process."""

    def __init__(self, ranks: tuple[int, ...], child: "subprocess.Popen[bytes]") -> None:
        self.ranks = ranks
        self._child = child
        self.pid = child.pid
        self.pidfd = os.pidfd_open(child.pid)
        assert child.stderr is not None
        self.output_fd = child.stderr.fileno()
        os.set_blocking(self.output_fd, False)

    def is_stopped(self) -> bool:
        """Whether the process is stopped (waitid(2): the report is looked at and left)."""
        if self._child.returncode is not None:
            return False
        options = os.WSTOPPED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PIDFD, self.pidfd, options) is not None
        except ChildProcessError:
            return False  # It has ended and is reaped.

    def reap(self) -> int | None:
        """Return the exit status once the process has ended."""
        return self._child.poll()

    def send_signal(self, number: int) -> None:
        """Signal the process, unless it has ended."""
        if self._child.poll() is None:
            self._child.send_signal(number)

    def close(self) -> None:
        """Close the descriptors."""
        os.close(self.pidfd)
        assert self._child.stderr is not None
        self._child.stderr.close()


class LocalLauncher:
    """Starts each rank as a child: ``command --connect ADDRESS --rank R --epoch E --parent PID``."""

    def __init__(self, command: Sequence[str] = WORKER_COMMAND) -> None:
        self._command = tuple(command)

    def launch(self, order: LaunchOrder) -> list[LocalProcess]:
        """Start all ranks."""
        started: list[LocalProcess] = []
        try:
            for rank in range(order.world_size):
                command = (
                    *(*self._command, "--connect", order.address, "--rank", str(rank)),
                    *("--epoch", str(order.epoch), "--parent", str(os.getpid())),
                )
                started.append(start_process((rank,), command, order))
        except BaseException:
            abandon(started)
            raise
        return started


def start_process(ranks: tuple[int, ...], command: Sequence[str], order: LaunchOrder) -> LocalProcess:
    """Start one process of an order, in a session of its own: a terminal's signals are the orchestrator's.

    Errors: ``InstanceFailedError`` where it cannot be started.
    """
    try:
        child = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            # Standard output is the orchestrator's own to answer on.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=Path("/"),
            env=dict(order.environment),
            pass_fds=order.inherited_fds,
            start_new_session=True,
        )
    except OSError as error:
        raise InstanceFailedError(f"rank {ranks[0]} cannot be started ({command[0]}): {error}") from None
    try:
        return LocalProcess(ranks, child)
    except BaseException:
        child.kill()
        child.wait()
        raise


def abandon(processes: Sequence[RankProcess]) -> None:
    """Kill processes that nobody supervises yet."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED | os.WNOWAIT)
        process.reap()
        process.close()
