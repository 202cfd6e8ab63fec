"""The ranks of one epoch: launched, booted, spoken to and ended as one group."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from orchestrator.config import Deadlines
from orchestrator.launcher import Launcher, LaunchOrder, abandon
from orchestrator.supervisor import RankLostError, Supervisor
from orchestrator.transport import Transport, UnreachableRankError
from protocol.control import (
    Boot,
    ExpertLoad,
    Fault,
    FaultKind,
    FromWorker,
    Hello,
    Progress,
    Ready,
    StepPlan,
    StepResult,
    Stop,
)


@dataclass(frozen=True, slots=True)
class RankEvents:
    """Where what ranks say goes. None of these may raise."""

    on_result: Callable[[StepResult], None]
    on_lost: Callable[[Fault], None]
    """Once at most, after the boot."""
    on_progress: Callable[[Progress | Ready], None]
    on_load: Callable[[ExpertLoad], None]
    on_output: Callable[[tuple[int, ...], str], None]


class Ranks:
    """Owns the control socket and the supervisor of one epoch. ``end`` must be awaited."""

    def __init__(
        self,
        launcher: Launcher,
        order: LaunchOrder,
        boots: Sequence[Boot],
        deadlines: Deadlines,
        events: RankEvents,
    ) -> None:
        self._boots, self._deadlines, self._events = boots, deadlines, events
        self._epoch = order.epoch
        self._sampling_rank = boots[0].topology.sampling_rank
        self._greeted: set[int] = set()
        self._ready: dict[int, Ready] = {}
        self._booted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._deadline: asyncio.Timeout | None = None
        # Bound before anyone is started, so that a rank never waits for it.
        self._transport = Transport(order.address, order.world_size, self._on_message, self._on_nonsense)
        try:
            processes = launcher.launch(order)
            try:
                self._supervisor = Supervisor(
                    processes,
                    order.epoch,
                    deadlines,
                    on_lost=self._on_lost,
                    on_output=events.on_output,
                    page_fd=boots[0].page_fd,
                )
            except BaseException:
                abandon(processes)
                raise
        except BaseException:
            self._transport.close()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end(politely=False)

    @property
    def pids(self) -> dict[int, int]:
        """Process id by rank."""
        return self._supervisor.pids

    @property
    def statuses(self) -> dict[int, int]:
        """Exit status by rank of those that have ended; filled as they do."""
        return self._supervisor.statuses

    async def boot(self) -> list[Ready]:
        """Wait until every rank is ready, and return what they learnt, by rank.

        Errors: ``RankLostError``, also where a rank does not say hello or nobody says anything in time.
        """
        try:
            async with asyncio.timeout(self._deadlines.hello_s) as self._deadline:
                await self._booted
        except TimeoutError:
            raise RankLostError(self._late()) from None
        finally:
            self._deadline = None
        return [self._ready[rank] for rank in range(len(self._boots))]

    def send(self, plan: StepPlan) -> None:
        """Send a plan to every rank; one that cannot be reached is lost."""
        try:
            self._transport.send_all(plan)
        except UnreachableRankError as error:
            self._unreachable(error)

    async def end(self, *, politely: bool) -> dict[int, int]:
        """End the group and close the socket; return the exit statuses by rank. Twice does nothing more."""
        if politely:
            try:
                self._transport.send_all(Stop(self._epoch))
            except UnreachableRankError:
                politely = False
        if not self._booted.done():
            self._booted.cancel()
        elif not self._booted.cancelled():
            self._booted.exception()  # Seen, where nobody came to wait for it.
        try:
            return await self._supervisor.end(politely=politely)
        finally:
            self._transport.close()

    def _unreachable(self, error: UnreachableRankError) -> None:
        # A rank that is gone has ended, or will have in a moment: that says more than a lost connection.
        self._supervisor.report(Fault(self._epoch, error.rank, FaultKind.HUNG, str(error)))

    def _late(self) -> Fault:
        everyone = range(len(self._boots))
        silent = [rank for rank in everyone if rank not in self._greeted]
        if silent:
            told = f"ranks {silent} have not said hello within {self._deadlines.hello_s:g} s of their start"
        else:
            silent = [rank for rank in everyone if rank not in self._ready]
            told = (
                f"ranks {silent} are not ready, and said nothing for {self._deadlines.boot_silence_s:g} s"
            )
        return Fault(self._epoch, silent[0], FaultKind.HUNG, told)

    def _on_lost(self, fault: Fault) -> None:
        if self._booted.done():
            self._events.on_lost(fault)
        else:
            self._booted.set_exception(RankLostError(fault))

    def _on_nonsense(self, rank: int, why: str) -> None:
        self._supervisor.report(Fault(self._epoch, rank, FaultKind.PROTOCOL, why))

    def _on_message(self, rank: int, message: FromWorker) -> None:
        if message.epoch != self._epoch:
            return
        if isinstance(message, StepResult):
            if rank != self._sampling_rank:
                self._on_nonsense(
                    rank, f"it answered a step, which is rank {self._sampling_rank}'s business"
                )
            else:
                self._events.on_result(message)
            return
        if message.rank != rank:
            self._on_nonsense(rank, f"it spoke as rank {message.rank}")
            return
        match message:
            case Hello():
                self._greet(message)
            case Progress():
                self._events.on_progress(message)
            case Ready():
                self._ready[rank] = message
                self._events.on_progress(message)
                if len(self._ready) == len(self._boots) and not self._booted.done():
                    self._booted.set_result(None)
            case ExpertLoad():
                self._events.on_load(message)
            case Fault():
                self._supervisor.report(message)
        self._note_progress()

    def _greet(self, hello: Hello) -> None:
        rank = hello.rank
        if rank in self._greeted or hello.pid != self.pids[rank]:
            self._on_nonsense(rank, f"process {hello.pid} said hello, {self.pids[rank]} was started")
            return
        self._greeted.add(rank)
        try:
            self._transport.send(rank, self._boots[rank])
        except UnreachableRankError as error:
            self._unreachable(error)

    def _note_progress(self) -> None:
        """A rank may be silent while it waits for its peers: anyone's progress is everyone's."""
        deadline = self._deadline
        if deadline is not None and not deadline.expired() and len(self._greeted) == len(self._boots):
            loop = asyncio.get_running_loop()
            deadline.reschedule(loop.time() + self._deadlines.boot_silence_s)
