"""The engine: plans go out, results come in, outputs go to their sinks, in that order.

Nothing here waits for anything but the next event; an idle engine has no timer and no work.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from orchestrator.expert_totals import ExpertTotals
from orchestrator.request import End, Request, RequestOutput, Sink
from orchestrator.scheduler import Scheduler
from orchestrator.supervisor import RankLostError, StepClock
from protocol.client import Stats
from protocol.control import ExpertLoad, Fault, FaultKind, StepPlan, StepResult
from protocol.errors import InstanceFailedError, ProtocolError, TandemError, UnavailableError
from protocol.runtime_dir import InstanceState

SECOND_LOOK_S: Final = 0.05
"""From a step's deadline to its verdict: what lies in the socket unread is read first, where it was this
process that was late."""
STEP_AVERAGE: Final = 0.05
"""Weight of the newest step in the moving average of step times."""


@dataclass(slots=True)
class _InFlight:
    """A step that was sent."""

    step: int
    num_tokens: int
    allowed_s: float
    sent_s: float


class Engine:
    """Owns the loop of one epoch, the steps in flight, and the instance's state.

    Everything but ``run`` returns at once. Requests' outputs come through their sinks, inside ``run`` and
    ``give_up`` alone.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        send: Callable[[StepPlan], None],
        step_clock: StepClock,
        *,
        sampling_rank: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler, self._send, self._step_clock = scheduler, send, step_clock
        self._depth, self._sampling_rank = scheduler.config.depth, sampling_rank
        self._clock = clock
        self.state: InstanceState = "ready"
        self._results: deque[StepResult] = deque()
        self._outputs: list[RequestOutput] = []
        self._experts = ExpertTotals()
        self._fault: Fault | None = None
        self._in_flight: deque[_InFlight] = deque()
        self._has_event = False
        self._waiter: asyncio.Future[None] | None = None
        self._expiry = _Timer(clock, self._wake)
        self._deadline = _Timer(clock, self._look_at_deadline)
        self._started_s = clock()
        self._committed_s = self._started_s
        self._num_steps = 0
        self._step_s = 0.0

    # What others tell it.

    def submit(self, request: Request) -> None:
        """Queue a request; QueueFullError, ContextTooLongError or UnavailableError where that cannot be."""
        if self.state != "ready":
            if self.state == "failed":
                raise InstanceFailedError("the instance has failed: start it again")
            raise UnavailableError(f"the instance is {self.state}: it takes no new requests")
        self._scheduler.add(request)
        self._wake()

    def cancel(self, request: Request) -> None:
        """Give a request up; one that has ended is ignored."""
        self._note(self._scheduler.cancel(request))

    def finish(self, request: Request, end: End) -> None:
        """End a request at its sink's word; one that has ended is ignored."""
        self._note(self._scheduler.finish(request, end))

    def on_result(self, result: StepResult) -> None:
        """Take the sampling rank's answer to a plan of this epoch."""
        self._results.append(result)
        self._wake()

    def on_load(self, load: ExpertLoad) -> None:
        """Take a rank's counts of its experts."""
        self._experts.take(load)

    def on_lost(self, fault: Fault) -> None:
        """Learn that a rank is lost: ``run`` ends."""
        if self._fault is None:
            self._fault = fault
            self._wake()

    def drain(self) -> None:
        """Take no new requests; ``run`` returns when those it has are done."""
        if self.state == "ready":
            self.state = "draining"
            self._wake()

    def end_requests(self, error: TandemError) -> None:
        """Fail the requests there are, at a drain's end or a user's word; ``run`` goes on."""
        self._outputs += self._scheduler.fail_all(error)
        self._wake()

    @property
    def has_requests(self) -> bool:
        """Whether any request runs or waits."""
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

    @property
    def has_committed(self) -> bool:
        """Whether this epoch has committed a step."""
        return self._num_steps > 0

    def stats(self) -> Stats:
        """Return the instance's numbers; ``id`` and ``connections`` are the gateway's to fill in."""
        scheduler, kv = self._scheduler, self._scheduler.kv
        counters = scheduler.counters
        return Stats(
            id="",
            uptime_s=self._clock() - self._started_s,
            waiting=scheduler.num_waiting,
            running=scheduler.num_running,
            finished=counters.finished,
            cancelled=counters.cancelled,
            failed=counters.failed,
            preemptions=counters.preemptions,
            steps=self._num_steps,
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            completion_tokens=counters.completion_tokens,
            blocks_total=kv.num_blocks,
            blocks_free=kv.num_free,
            blocks_cached=kv.num_cached,
            connections=0,
            step_ms=self._step_s * 1e3,
            experts=self._experts.balance(),
        )

    # The loop.

    async def run(self) -> None:
        """Serve until drained.

        Errors: ``RankLostError`` when a rank is lost; the requests are then as they were (``give_up``).
        """
        try:
            while True:
                await self._next_event()
                outputs = self._take_in()
                self._send_plans()
                self._publish(outputs)
                if not self._in_flight:
                    self._check_idle()
                    if self.state == "draining" and not self._has_event:
                        return
        finally:
            self._expiry.cancel()
            self._deadline.cancel()

    def give_up(self, error: TandemError) -> None:
        """Fail every request; nothing is taken in any more."""
        self.state = "failed"
        self._publish([*self._outputs, *self._scheduler.fail_all(error)])
        self._outputs = []

    async def _next_event(self) -> None:
        if not self._has_event:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._has_event = False
        if self._fault is not None:
            raise RankLostError(self._fault)

    def _take_in(self) -> list[RequestOutput]:
        """Return what has come about since the last turn: ends that were asked for, and results."""
        outputs, self._outputs = self._outputs, []
        now = self._clock()
        while self._results:
            outputs += self._commit(self._results.popleft(), now)
        if self._expiry.is_due(now):
            outputs += self._scheduler.expire(now)
        return outputs

    def _commit(self, result: StepResult, now: float) -> list[RequestOutput]:
        try:
            outputs = self._scheduler.commit(result)
        except ProtocolError as error:
            raise RankLostError(self._fault_of(FaultKind.PROTOCOL, error.message)) from None
        step = self._in_flight.popleft()
        took_s = now - max(step.sent_s, self._committed_s)
        self._committed_s = now
        self._num_steps += 1
        weight = STEP_AVERAGE if self._num_steps > 1 else 1.0
        self._step_s += weight * (took_s - self._step_s)
        return outputs

    def _send_plans(self) -> None:
        """Send as many plans as may be in flight."""
        now = self._clock()
        while len(self._in_flight) < self._depth:
            plan = self._scheduler.plan(now)
            if plan is None:
                break
            self._send(plan)
            num_tokens = sum(advance.num_tokens for advance in plan.advances)
            allowed_s = self._step_clock.allowed_s(num_tokens)
            self._in_flight.append(_InFlight(plan.step, num_tokens, allowed_s, now))
        self._expiry.set(self._scheduler.next_deadline())
        self._deadline.set_no_later(self._oldest_deadline())

    def _check_idle(self) -> None:
        """Hold every invariant against the facts: nothing in flight could explain a difference now."""
        self._scheduler.check()
        assert self._has_event or self._scheduler.is_idle, "requests wait, and no step can run"

    def _publish(self, outputs: Sequence[RequestOutput]) -> None:
        by_sink: dict[int, tuple[Sink, list[RequestOutput]]] = {}
        for output in outputs:
            sink = output.request.sink
            found = by_sink.get(id(sink))
            if found is None:
                by_sink[id(sink)] = (sink, [output])
            else:
                found[1].append(output)
        for sink, its in by_sink.values():
            sink.deliver(its)

    def _note(self, output: RequestOutput | None) -> None:
        if output is not None:
            self._outputs.append(output)
            self._wake()

    def _wake(self) -> None:
        self._has_event = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # The hang of a step.

    def _oldest_deadline(self) -> float | None:
        """Return when the oldest step must be answered; no later step can be before it is."""
        if not self._in_flight:
            return None
        oldest = self._in_flight[0]
        return max(oldest.sent_s, self._committed_s) + oldest.allowed_s

    def _look_at_deadline(self) -> None:
        now, deadline = self._clock(), self._oldest_deadline()
        if deadline is None or self._results:
            return
        if now < deadline:
            self._deadline.set_no_later(deadline)
        elif now < deadline + SECOND_LOOK_S:
            self._deadline.set_no_later(deadline + SECOND_LOOK_S)
        else:
            self.on_lost(self._hung(now))

    def _hung(self, now: float) -> Fault:
        oldest = self._in_flight[0]
        waited_s = now - max(oldest.sent_s, self._committed_s)
        predicted_s = self._step_clock.predicted_s(oldest.num_tokens)
        return self._fault_of(
            FaultKind.HUNG,
            f"step {oldest.step} ({oldest.num_tokens} tokens) is not answered after {waited_s:.2f} s, "
            f"predicted were {predicted_s:.3f} s: this rank answers for all, any of them may hang",
        )

    def _fault_of(self, kind: FaultKind, message: str) -> Fault:
        return Fault(self._scheduler.epoch, self._sampling_rank, kind, message)


class _Timer:
    """One call on the loop at a time of ``clock``. It moves the loop's timer only when it must."""

    def __init__(self, clock: Callable[[], float], call: Callable[[], None]) -> None:
        self._clock, self._call = clock, call
        self._at: float | None = None
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at: float | None) -> None:
        """Call at that time and no other; None: not at all."""
        if at == self._at and self._handle is not None:
            return
        self.cancel()
        if at is not None:
            self._at = at
            self._handle = asyncio.get_running_loop().call_later(max(at - self._clock(), 0.0), self._fire)

    def set_no_later(self, at: float | None) -> None:
        """Call at that time or before; None: not at all."""
        if at is None or self._at is None or self._handle is None or at < self._at:
            self.set(at)

    def is_due(self, now: float) -> bool:
        """Whether its time has come, or came and it has fired."""
        return self._at is not None and now >= self._at

    def cancel(self) -> None:
        """Call no more."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle = self._at = None

    def _fire(self) -> None:
        self._handle = None
        self._call()
