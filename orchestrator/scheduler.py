"""Which rows run in the next step: pure, synchronous, no clock of its own.

There are no phases. A request has a target (known tokens and those that steps in flight will sample) and
a count of computed ones; a step moves computed towards the target by what its token budget gives.
Chunked prefill, prefix hits, preemption and recompute after a fault are this one movement.

Order of a step: running rows with one token to go, running rows with more, then the queue. With stages,
where not everybody fits in a step, it is of those who have waited longest for a turn. The queue runs by
arrival, where a point of priority is worth ``AGE_S`` of waiting: so a request can only be overtaken by
those that come within its disadvantage × ``AGE_S`` after it, and nobody starves. When blocks run out, the
last of that same order gives way; the first never does, and what is given goes to rows that run before it
goes to the queue: so there is always progress.
"""

import heapq
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import msgspec

from kv.manager import Holding, KVManager
from orchestrator.request import End, Request, RequestOutput, RequestState
from protocol.control import Advance, NewRow, StepPlan, StepResult, TokenLogprobs
from protocol.errors import (
    ContextTooLongError,
    DeadlineExceededError,
    ProtocolError,
    QueueFullError,
    TandemError,
)

AGE_S = 1.0
"""Seconds of waiting that one point of priority is worth."""


class SchedulerConfig(msgspec.Struct, frozen=True):
    """Bounds of a step and of the queue."""

    epoch: int
    max_rows: int
    step_tokens: int
    """At least ``max_rows``, so that a long prompt never keeps a running row from its next token."""
    context: int
    pp: int
    max_waiting: int

    def __post_init__(self) -> None:
        if self.step_tokens < self.max_rows:
            raise ValueError(f"step_tokens {self.step_tokens} must be at least max_rows {self.max_rows}")

    @property
    def depth(self) -> int:
        """Plans in flight."""
        return self.pp + 1


@dataclass(slots=True)
class Counters:
    """Totals since the scheduler was made."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    preemptions: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class _Step:
    """A plan in flight: its rows, beside its advances."""

    number: int
    rows: list[Request]
    advances: list[Advance]
    leaving: list[Request] = field(default_factory=list)
    """Rows that ended or gave way, whose slot and blocks this step is the last to write."""


class Scheduler:
    """Owner of all requests between admission and their end, of the slots, and of the KV manager."""

    def __init__(self, config: SchedulerConfig, kv: KVManager) -> None:
        self.config = config
        self.kv = kv
        self.counters = Counters()
        self._epoch = config.epoch
        self._order = count()
        self._waiting: list[tuple[tuple[float, int], Request]] = []
        self._num_waiting = 0
        self._deadlines: list[tuple[float, int, Request]] = []
        self._running: dict[Request, None] = {}
        self._decode = [Advance(slot, 1, None, True) for slot in range(config.max_rows)]
        self._reset_steps()

    def _reset_steps(self) -> None:
        self._in_flight: deque[_Step] = deque()
        self._next_step = 0
        self._free_slots = list(range(self.config.max_rows - 1, -1, -1))
        self._released: list[int] = []
        self._num_leaving = 0
        self._num_giving_way = 0

    @property
    def epoch(self) -> int:
        """The instance's epoch: results of another are dropped."""
        return self._epoch

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return self._num_waiting

    @property
    def num_running(self) -> int:
        """Requests with a slot."""
        return len(self._running)

    @property
    def num_in_flight(self) -> int:
        """Plans without a result."""
        return len(self._in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits, runs or is in flight."""
        return not (self._num_waiting or self._running or self._in_flight)

    # Requests come and go.

    def add(self, request: Request) -> None:
        """Queue a request.

        Errors: ``ContextTooLongError`` for one that can never fit, ``QueueFullError`` at the bound.
        """
        total = len(request.prompt_ids) + request.max_tokens
        if total > self.config.context:
            raise ContextTooLongError(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_tokens} to come are over the "
                f"context of {self.config.context}",
                field="max_tokens",
            )
        # The last token is sampled and never computed.
        needed = self.kv.blocks_needed(total - 1, self._most_uncommitted)
        if needed > self.kv.num_blocks:
            raise ContextTooLongError(
                f"{total} tokens need {needed} KV blocks, the pool has {self.kv.num_blocks} "
                f"({self.kv.num_blocks * self.kv.block_tokens} tokens): ask for fewer",
                field="max_tokens",
            )
        if self._num_waiting >= self.config.max_waiting:
            raise QueueFullError(f"{self._num_waiting} requests wait already, the bound: try again later")
        order = next(self._order)
        request.queue_key = (request.arrival_s - AGE_S * request.priority, order)
        request.token_ids = list(request.prompt_ids)
        request.num_target = len(request.token_ids)
        request.num_to_sample = request.max_tokens
        request.state = RequestState.WAITING
        self._push(request)
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, order, request))
        self.counters.prompt_tokens += len(request.prompt_ids)

    @property
    def _most_uncommitted(self) -> int:
        return self.config.step_tokens * self.config.depth

    def _push(self, request: Request) -> None:
        heapq.heappush(self._waiting, (request.queue_key, request))
        self._num_waiting += 1

    def cancel(self, request: Request) -> RequestOutput | None:
        """End a request as cancelled; None where it has ended already."""
        return self._end_early(request, End.CANCELLED, None)

    def finish(self, request: Request, end: End) -> RequestOutput | None:
        """End a request at its sink's word (a stop string); what is in flight for it is dropped."""
        return self._end_early(request, end, None)

    def expire(self, now: float) -> list[RequestOutput]:
        """Fail the requests whose deadline has passed."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, request = heapq.heappop(self._deadlines)
            error = DeadlineExceededError(
                f"the request's deadline passed after {request.num_output} tokens", field="timeout_s"
            )
            output = self._end_early(request, End.FAILED, error)
            if output is not None:
                outputs.append(output)
        return outputs

    def next_deadline(self) -> float | None:
        """Return when ``expire`` next has something to do."""
        while self._deadlines and self._deadlines[0][2].state is RequestState.ENDED:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def fail_all(self, error: TandemError) -> list[RequestOutput]:
        """End everything with an error."""
        found = [*self._running, *(request for _, request in self._waiting)]
        outputs = [self._end_early(request, End.FAILED, error) for request in found]
        return [output for output in outputs if output is not None]

    def _end_early(self, request: Request, end: End, error: TandemError | None) -> RequestOutput | None:
        if request.state is RequestState.ENDED:
            return None
        self._end(request, end)
        return RequestOutput(request, (), end=end, error=error)

    def _end(self, request: Request, end: End) -> None:
        if request.state is RequestState.RUNNING:
            self._leave(request)
        else:
            # Its entry in the heap is passed over when it comes up.
            self._num_waiting -= 1
            self._drop_ended_waiting()
        request.state = RequestState.ENDED
        match end:
            case End.CANCELLED:
                self.counters.cancelled += 1
            case End.FAILED:
                self.counters.failed += 1
            case _:
                self.counters.finished += 1

    def _drop_ended_waiting(self) -> None:
        # Ended entries are at most as many as live ones, so the heap stays bounded.
        if len(self._waiting) > 2 * self._num_waiting + 64:
            self._waiting = [e for e in self._waiting if e[1].state is RequestState.WAITING]
            heapq.heapify(self._waiting)

    def _leave(self, request: Request) -> None:
        """Take a row out; its slot and blocks come back when no step in flight may write them."""
        del self._running[request]
        if request.is_giving_way:
            request.is_giving_way = False
            self._num_giving_way -= 1
        if self._in_flight and request.last_step >= self._in_flight[0].number:
            last = self._in_flight[request.last_step - self._in_flight[0].number]
            last.leaving.append(request)
            self._num_leaving += 1
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        assert request.holding is not None
        self.kv.release(request.holding)
        request.holding = None
        self._free_slots.append(request.slot)
        self._released.append(request.slot)
        request.slot = -1

    # A step is planned.

    def plan(self, now: float) -> StepPlan | None:
        """Return the next step; None where there is nothing to run or enough is in flight."""
        config = self.config
        if len(self._in_flight) >= config.depth or not (self._running or self._num_waiting):
            return None
        step = self._next_step
        rows: list[Request] = []
        advances: list[Advance] = []
        most_rows = -(-min(len(self._running) + self._num_waiting, config.max_rows) // config.pp)
        budget = config.step_tokens
        longer: list[Request] = []
        new_rows: list[NewRow] = []
        decode = self._decode
        turn = self._in_turn(most_rows)
        if config.pp > 1 and len(turn) == most_rows and (admitted := self._admit(now)) is not None:
            # Of all who may have this turn the queue's first has waited longest: rows that run would
            # otherwise take every turn and let nobody in.
            turn.pop()
            new_rows.append(_new_row(admitted))
            budget -= self._advance_by_chunk(admitted, budget - len(turn), rows, advances)
        for request in turn:
            holding = request.holding
            if holding is None or request.num_to_sample == 0 or request.is_giving_way:
                continue  # Without blocks: it gave way to a row before it.
            computed = request.num_target
            if computed - request.num_computed != 1:
                longer.append(request)
                continue
            if computed <= holding.capacity:
                advance = decode[request.slot]
            elif (blocks := self._allocate(request, holding, computed)) is not None:
                advance = Advance(request.slot, 1, blocks, True)
            else:
                continue
            request.num_computed = computed
            request.num_target = computed + 1
            request.num_to_sample -= 1
            request.last_step = step
            budget -= 1
            rows.append(request)
            advances.append(advance)
        for request in longer:
            if budget and request.holding is not None and not request.is_giving_way:
                budget -= self._advance_by_chunk(request, budget, rows, advances)
        while budget and len(rows) < most_rows and (admitted := self._admit(now)) is not None:
            new_rows.append(_new_row(admitted))
            budget -= self._advance_by_chunk(admitted, budget, rows, advances)
        if not rows:
            assert not new_rows
            # Where a row gave way in its own turn it is the next one's: nobody might ask again.
            return self.plan(now) if any(request.holding is None for request in turn) else None
        plan = StepPlan(self._epoch, step, self._released, new_rows, advances)
        self._released = []
        self._in_flight.append(_Step(step, rows, advances))
        self._next_step = step + 1
        self.counters.steps += 1
        return plan

    def _in_turn(self, most_rows: int) -> list[Request]:
        """Return the running rows whose turn it is: with stages, those that have waited longest for it."""
        if self.config.pp == 1:
            return list(self._running)
        ready = [r for r in self._running if r.num_to_sample and not r.is_giving_way]
        ready.sort(key=lambda request: request.last_step)
        return ready[:most_rows]

    def _advance_by_chunk(
        self, request: Request, budget: int, rows: list[Request], advances: list[Advance]
    ) -> int:
        """Add what the budget allows of a row to the step; return the tokens taken (0: no blocks)."""
        num_tokens = min(request.num_target - request.num_computed, budget)
        computed = request.num_computed + num_tokens
        holding = request.holding
        assert holding is not None
        blocks = None
        if computed > holding.capacity:
            blocks = self._allocate(request, holding, computed)
            if blocks is None:
                return 0
        wants = computed == request.num_target
        request.num_computed = computed
        if wants:
            request.num_target += 1
            request.num_to_sample -= 1
        request.last_step = self._next_step
        rows.append(request)
        advances.append(Advance(request.slot, num_tokens, blocks, wants))
        return num_tokens

    def _admit(self, now: float) -> Request | None:
        """Give the queue's first a slot, where there is one and its known tokens find room."""
        while self._waiting and self._waiting[0][1].state is not RequestState.WAITING:
            heapq.heappop(self._waiting)
        if not self._waiting or not self._free_slots or self._num_giving_way or not self.kv.num_available:
            return None
        request = self._waiting[0][1]
        known, scored = len(request.token_ids), request.sampling.prompt_logprobs
        skips_hits = scored is not None and request.num_scored < len(request.prompt_ids)
        hit = None if skips_hits else self.kv.match_prefix(request.token_ids, request.cache_salt)
        holding = (
            self.kv.open(hit, request.cache_salt)
            if hit is not None
            else self.kv.open_empty(request.cache_salt)
        )
        missing = self.kv.blocks_needed(known, self._most_uncommitted) - self.kv.num_held(holding)
        if missing + self._promised() > self.kv.num_available:
            self.kv.release(holding)
            return None
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        request.holding = holding
        request.slot = self._free_slots.pop()
        request.num_computed = request.num_committed = holding.capacity
        request.state = RequestState.RUNNING
        if request.admitted_s is None:
            request.admitted_s = now
            request.num_cached = holding.capacity
            self.counters.cached_tokens += holding.capacity
        self._running[request] = None
        return request

    def _promised(self) -> int:
        """Return the blocks that running rows lack for their next tokens: theirs before the queue's.

        Else a row that gave way could take back what it gave before the row that it made way for has a
        turn, and give way again, for ever.
        """
        return sum(
            max(
                self.kv.blocks_needed(request.num_target, self._most_uncommitted)
                - self.kv.num_held(request.holding),
                0,
            )
            for request in self._running
            if request.holding is not None and request.num_target > request.holding.capacity
        )

    def _allocate(
        self, request: Request, holding: Holding, num_tokens: int
    ) -> tuple[list[int], ...] | None:
        """Return new blocks; None where the row must wait for others, or gives way itself."""
        while (blocks := self.kv.allocate(holding, num_tokens)) is None:
            # What is on its way back may be enough: one row gives way at a time.
            if self._num_giving_way or self._num_leaving:
                return None
            last = max(self._running, key=lambda r: r.queue_key)
            if not self._in_flight or last.last_step < self._in_flight[0].number:
                if last.last_step == self._next_step:
                    return None  # It runs in this very step.
                self._preempt(last)
                if last is request:
                    return None
                continue
            last.is_giving_way = True
            self._num_giving_way += 1
            return None
        return blocks

    def _preempt(self, request: Request) -> None:
        """Take a row without steps in flight back to the queue, to be computed again."""
        self.counters.preemptions += 1
        self._leave(request)
        request.state = RequestState.WAITING
        request.num_target = len(request.token_ids)
        request.num_computed = request.num_committed = 0
        request.num_to_sample = request.max_tokens - request.num_output
        self._push(request)

    # A result comes back.

    def commit(self, result: StepResult) -> list[RequestOutput]:
        """Take a step's result; return what it brought, in law order.

        Errors: ``ProtocolError`` for a result that cannot be right. One of another epoch brings nothing.
        """
        if result.epoch != self._epoch:
            return []
        if not self._in_flight or self._in_flight[0].number != result.step:
            expected = self._in_flight[0].number if self._in_flight else "none"
            raise ProtocolError(f"a result of step {result.step} came, {expected} was expected")
        step = self._in_flight[0]
        scores = self._scores_of(step, result)
        outputs: list[RequestOutput] = []
        token_ids, logprobs = result.token_ids, result.logprobs
        at = 0
        ended: list[tuple[Request, End]] = []
        for request, advance in zip(step.rows, step.advances, strict=True):
            wants = advance.wants_logits
            if wants:
                at += 1
            if request.state is not RequestState.RUNNING:
                continue
            request.num_committed += advance.num_tokens
            scored = scores.get(request) if scores else None
            if wants:
                sampled = token_ids[at - 1]
                request.token_ids += sampled
                end = self._end_of(request, sampled)
                outputs.append(
                    RequestOutput(
                        request, sampled, logprobs[at - 1] if logprobs is not None else None, scored, end
                    )
                )
                if end is not None:
                    ended.append((request, end))
            elif scored is not None:
                outputs.append(RequestOutput(request, (), None, scored))
            holding = request.holding
            assert holding is not None
            if request.num_committed >= holding.next_event:
                self.kv.note_computed(holding, request.token_ids, request.num_committed)
        if at != len(token_ids):
            raise ProtocolError(f"step {result.step} sampled {len(token_ids)} rows, {at} wanted tokens")
        self.counters.completion_tokens += at
        self._in_flight.popleft()
        for request, end in ended:
            self._end(request, end)
        for request in step.leaving:
            self._num_leaving -= 1
            self._release(request)
        if self._num_giving_way:
            self._preempt_those_who_may()
        return outputs

    def _end_of(self, request: Request, sampled: list[int]) -> End | None:
        if len(sampled) != 1:
            raise ProtocolError(f"slot {request.slot} sampled {len(sampled)} tokens, 1 was asked")
        if sampled[0] in request.stop_token_ids:
            return End.STOP
        if len(request.token_ids) - len(request.prompt_ids) >= request.max_tokens:
            return End.LENGTH
        return None

    def _scores_of(self, step: _Step, result: StepResult) -> dict[Request, tuple[int, list[TokenLogprobs]]]:
        """Return prompt scores by request, without those that went out before a preemption."""
        found: dict[Request, tuple[int, list[TokenLogprobs]]] = {}
        if not result.prompt_logprobs:
            return found
        by_slot = {advance.slot: row for row, advance in zip(step.rows, step.advances, strict=True)}
        for scores in result.prompt_logprobs:
            request = by_slot.get(scores.slot)
            if request is None:
                raise ProtocolError(f"step {step.number} scored slot {scores.slot}, which it does not run")
            old = max(request.num_scored - scores.start, 0)
            if scores.tokens[old:]:
                found[request] = (scores.start + old, scores.tokens[old:])
                request.num_scored = scores.start + len(scores.tokens)
        return found

    def _preempt_those_who_may(self) -> None:
        oldest = self._in_flight[0].number if self._in_flight else self._next_step
        for request in [r for r in self._running if r.is_giving_way and r.last_step < oldest]:
            self._preempt(request)

    # Faults and checks.

    def restart(self, epoch: int) -> None:
        """Start over after a fault: an empty pool, and all that ran waits again with its known tokens."""
        self._epoch = epoch
        running = list(self._running)
        self._running.clear()
        self._reset_steps()
        self.kv.clear()
        for request in running:
            request.state = RequestState.WAITING
            request.is_giving_way = False
            request.slot, request.holding, request.last_step = -1, None, -1
            request.num_target = len(request.token_ids)
            request.num_computed = request.num_committed = 0
            request.num_to_sample = request.max_tokens - request.num_output
            self._push(request)

    def check(self) -> None:
        """Walk everything; an error where an invariant does not hold. For tests, and whenever idle."""
        leaving = [request for step in self._in_flight for request in step.leaving]
        assert len(leaving) == self._num_leaving, (leaving, self._num_leaving)
        with_slot = [*self._running, *leaving]
        slots = [request.slot for request in with_slot] + self._free_slots
        assert sorted(slots) == list(range(self.config.max_rows)), slots
        assert self._num_giving_way == sum(r.is_giving_way for r in self._running)
        assert self._num_waiting == sum(r.state is RequestState.WAITING for _, r in self._waiting)
        self.kv.check(r.holding for r in with_slot if r.holding is not None)
        for request in self._running:
            assert request.state is RequestState.RUNNING, request
            assert request.holding is not None, request
            assert request.num_committed <= request.num_computed <= request.holding.capacity, request
            assert request.num_computed < request.num_target, request
            assert request.num_to_sample >= 0, request
        if self.is_idle:
            assert self.kv.num_available == self.kv.num_blocks, "blocks are held and nothing runs"


def _new_row(request: Request) -> NewRow:
    assert request.holding is not None
    banned = sorted(request.stop_token_ids) if request.min_tokens else []
    return NewRow(
        slot=request.slot,
        token_ids=list(request.token_ids),
        num_prompt_tokens=len(request.prompt_ids),
        num_computed_tokens=request.num_computed,
        block_ids=tuple(list(table) for table in request.holding.tables),
        sampling=request.sampling,
        banned_token_ids=banned,
        banned_until=len(request.prompt_ids) + request.min_tokens,
    )
