"""The supervisor: who notices that a rank is lost, says why, and ends the group.

A death is seen by pidfd at once, a stop by looking every quarter of a second, a hang by its step's
deadline (``StepClock``, kept by the engine) or its boot's. What a loss leads to is the ``RestartPolicy``'s.
"""

import asyncio
import signal
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, Protocol

from orchestrator.config import Deadlines
from orchestrator.launcher import RankProcess
from orchestrator.output import OutputPipe
from protocol.abort_page import write_abort
from protocol.control import Fault, FaultKind, Ready
from protocol.errors import (
    COLLECTIVE_CODE,
    ErrorInfo,
    InstanceFailedError,
    InvalidRequestError,
    TandemError,
    from_info,
)

STOP_LOOK_S: Final = 0.25
SETTLE_S: Final = 0.1
"""From the first word of a fault to its verdict: a rank's death makes its peers fault too, maybe first."""
REAP_S: Final = 10.0
"""How long what was killed may take to be gone; only the kernel can make it longer."""


_TELLING: Final = {
    FaultKind.HUNG: 0,
    FaultKind.STEP: 3,
    FaultKind.LOAD: 4,
    FaultKind.PROTOCOL: 4,
    FaultKind.STOPPED: 5,
    FaultKind.DIED: 6,
}
"""Which of several faults that come together is the cause: the highest, the first of equals."""
_ENDED_BY_ITSELF: Final = 1
_WAITED_IN_VAIN: Final = 2
"""For a peer, which may have a cause to tell: its words can be the later ones."""


class RankLostError(Exception):
    """An epoch has ended: a rank is lost. Internal; what clients see is ``fault_error``."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


def fault_error(fault: Fault) -> TandemError:
    """Return the error that people are told: the rank's own where it refused its model or its memory."""
    if fault.kind is FaultKind.LOAD and fault.code != "error":
        return from_info(ErrorInfo(fault.code, f"rank {fault.rank}: {fault.message}"))
    return InstanceFailedError(f"rank {fault.rank} is lost ({fault.kind}): {fault.message}")


class RestartPolicy(Protocol):
    """What a loss leads to."""

    def may_restart(self, fault: Fault, *, has_committed: bool) -> bool:
        """Whether the group is started again. Asked once for each fault.

        ``has_committed``: a token was committed since the last one, which is then not consecutive.
        """


class NeverRestart:
    """Give up at the first fault."""

    def may_restart(self, fault: Fault, *, has_committed: bool) -> bool:  # noqa: ARG002
        """Return False."""
        return False


def restart_policy(max_restarts: int) -> RestartPolicy:
    """Return the policy of ``--max-restarts``; ``InvalidRequestError`` for one that there is not."""
    if max_restarts != 0:
        raise InvalidRequestError(
            f"max_restarts {max_restarts} is not possible: a lost rank ends the instance, ask for 0",
            field="max_restarts",
        )
    return NeverRestart()


class StepClock:
    """How long a step may take before its group counts as hung.

    A rank's coefficients are those of a step of the whole pipeline, barrier to barrier; the slowest
    rank's count.
    """

    def __init__(self, ready: Iterable[Ready], deadlines: Deadlines) -> None:
        found = list(ready)
        self._fixed_s = max(r.step_seconds_fixed for r in found)
        self._per_token_s = max(r.step_seconds_per_token for r in found)
        self._floor_s, self._factor = deadlines.step_floor_s, deadlines.step_factor

    def predicted_s(self, num_tokens: int) -> float:
        """Return what a step of so many tokens should take."""
        return self._fixed_s + self._per_token_s * num_tokens

    def allowed_s(self, num_tokens: int) -> float:
        """Return what it may take: max(floor, factor × predicted)."""
        return max(self._floor_s, self._factor * self.predicted_s(num_tokens))


class Supervisor:
    """Watches one epoch's processes and is their one reaper.

    ``on_lost`` is called once at most, with the most telling of the faults found within ``SETTLE_S``.
    ``on_output(ranks, line)`` gets what they write to standard error. ``page_fd``: the abort page of ranks
    whose kernels wait for each other; it is written before anyone hears of a fault or is signalled. ``end``
    must be awaited before the supervisor is let go, whatever happened.
    """

    def __init__(
        self,
        processes: Sequence[RankProcess],
        epoch: int,
        deadlines: Deadlines,
        *,
        on_lost: Callable[[Fault], None],
        on_output: Callable[[tuple[int, ...], str], None],
        page_fd: int | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes = tuple(processes)
        self._epoch = epoch
        self._deadlines = deadlines
        self._on_lost = on_lost
        self._page_fd = page_fd
        self._faults: list[tuple[int, Fault]] = []
        self._finishing: asyncio.Task[None] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._is_ending = False
        self._all_gone = asyncio.Event()
        self.statuses: dict[int, int] = {}
        """Exit status by rank, of those that have ended; negative: the signal."""
        self._pipes: dict[int, OutputPipe] = {}
        for process in self._processes:
            self._pipes[process.pid] = OutputPipe(process.output_fd, partial(on_output, process.ranks))
            self._loop.add_reader(process.pidfd, self._ended, process)
        self._look = self._loop.call_later(STOP_LOOK_S, self._look_for_stopped)

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank."""
        return {rank: process.pid for process in self._processes for rank in process.ranks}

    def report(self, fault: Fault) -> None:
        """Take anyone's word that a rank is lost. Other epochs' and later words change nothing."""
        is_witness = fault.code == COLLECTIVE_CODE
        self._note(_WAITED_IN_VAIN if is_witness else _TELLING[fault.kind], fault)

    def _note(self, telling: int, fault: Fault) -> None:
        if self._is_ending or fault.epoch != self._epoch:
            return
        self._faults.append((telling, fault))
        if self._settling is None:
            self._settling = self._loop.call_later(SETTLE_S, self._declare)

    def _declare(self) -> None:
        if not self._is_ending:
            # Not at the first word: peers that are told to give up say so, and that is no cause.
            self._end_waiting()
            self._on_lost(max(self._faults, key=lambda found: found[0])[1])

    def _ended(self, process: RankProcess) -> None:
        status = process.reap()
        if status is None:
            return  # A wake-up without a cause: the descriptor says so again when there is one.
        self._loop.remove_reader(process.pidfd)
        last_words = self._pipes[process.pid].finish()
        self.statuses.update(dict.fromkeys(process.ranks, status))
        if len(self.statuses) == len(self.pids):
            self._all_gone.set()
        message = f"its process {process.pid} ended with {status_words(status)}"
        if last_words and status >= 0:
            message += f"; it said: {last_words}"
        # One that was killed explains its peers' faults; one that ended by itself has told why before.
        telling = _TELLING[FaultKind.DIED] if status < 0 else _ENDED_BY_ITSELF
        self._note(telling, Fault(self._epoch, process.ranks[0], FaultKind.DIED, message))

    def _look_for_stopped(self) -> None:
        self._look = self._loop.call_later(STOP_LOOK_S, self._look_for_stopped)
        for process in self._processes:
            if process.ranks[0] not in self.statuses and process.is_stopped():
                message = f"its process {process.pid} is stopped (by a signal or a debugger)"
                self.report(Fault(self._epoch, process.ranks[0], FaultKind.STOPPED, message))

    async def end(self, *, politely: bool) -> dict[int, int]:
        """End the group and return the exit statuses by rank.

        ``politely``: they have been told to stop, and get ``stop_s`` for it. Then SIGTERM, then SIGKILL.
        A cancellation does not keep this from being finished.
        """
        if self._finishing is None:
            self._is_ending = True
            self._look.cancel()
            if self._settling is not None:
                self._settling.cancel()
            self._finishing = self._loop.create_task(self._end(politely))
        try:
            await asyncio.shield(self._finishing)
        except asyncio.CancelledError:
            await self._finishing
            raise
        return self.statuses

    async def _end(self, politely: bool) -> None:
        deadlines = self._deadlines
        is_gone = politely and await self._gone_within(deadlines.stop_s)
        if not is_gone:
            self._end_waiting()
            self._signal(signal.SIGTERM)
            # One that is stopped takes no signal but SIGKILL before it goes on.
            self._signal(signal.SIGCONT)
            is_gone = await self._gone_within(deadlines.kill_grace_s)
        if not is_gone:
            self._signal(signal.SIGKILL)
            is_gone = await self._gone_within(REAP_S)
        for process in self._processes:
            self._loop.remove_reader(process.pidfd)
            self._pipes[process.pid].finish()
            process.close()
        if not is_gone:
            left = {rank: pid for rank, pid in self.pids.items() if rank not in self.statuses}
            raise InstanceFailedError(
                f"processes do not end though killed (rank: pid): {left}; the kernel holds them"
            )

    def _end_waiting(self) -> None:
        """End the kernels that wait for a rank: while they run, their device is not given back."""
        if self._page_fd is not None:
            write_abort(self._page_fd)

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.ranks[0] not in self.statuses:
                process.send_signal(number)

    async def _gone_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._all_gone.wait()
        except TimeoutError:
            return False
        return True


def status_words(status: int) -> str:
    """Return an exit status in words."""
    if status >= 0:
        return f"exit code {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"
