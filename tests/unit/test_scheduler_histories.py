"""Random histories of the scheduler against a rank that remembers what is in every block.

The fake rank writes, for each position, the hash of all tokens up to it, and reads the whole visible
context back before it samples: a block that is reused too early, shared wrongly or not filled is seen
as a wrong hash. Its tokens follow from those hashes, so each request has one right answer.
"""

import os
import zlib
from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kv.manager import KVManager
from models.blocks import BlockNeeds
from models.spec import KVGroup
from orchestrator.request import End, Request, RequestOutput, RequestState
from orchestrator.scheduler import AGE_S, Scheduler, SchedulerConfig
from protocol.control import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from protocol.errors import ContextTooLongError, InstanceFailedError, QueueFullError
from protocol.sampling import SamplingParams

BLOCK = 4
VOCAB = 7
STOP = 0


def group(name: str, window: int | None = None) -> KVGroup:
    """Return a group; a negative window is a chunk."""
    return KVGroup(
        name,
        layers=(0,),
        kv_heads=1,
        key_dim=1,
        value_dim=1,
        dtype="float32",
        kind="full" if window is None else "sliding" if window > 0 else "chunked",
        window=abs(window or 0),
    )


def first_seen(group: KVGroup, position: int) -> int:
    """Return the first position that a query sees, by walking back from it."""
    first = position
    while first and group.kind != "full":
        within = position - first + 1 < group.window
        if not (within if group.kind == "sliding" else first % group.window):
            break
        first -= 1
    return 0 if group.kind == "full" else first


def chained(before: int, token: int) -> int:
    return zlib.crc32(f"{before},{token}".encode())


def hash_of(token_ids: list[int]) -> int:
    found = 1
    for token in token_ids:
        found = chained(found, token)
    return found


def next_token(context: int, banned: bool) -> int:
    token = context % VOCAB
    return 1 + token % (VOCAB - 1) if banned else token


def right_answer(request: Request) -> list[int]:
    """What a request must bring if nobody disturbs it."""
    found: list[int] = []
    context = hash_of(request.prompt_ids)
    while len(found) < request.max_tokens:
        token = next_token(context, len(found) < request.min_tokens)
        found.append(token)
        if token in request.stop_token_ids:
            break
        context = chained(context, token)
    return found


class Rank:
    """Rows and memory of one strict rank."""

    def __init__(self, groups: tuple[KVGroup, ...], max_rows: int, step_tokens: int) -> None:
        self.groups, self.max_rows, self.step_tokens = groups, max_rows, step_tokens
        self.rows: dict[int, dict[str, Any]] = {}
        self.memory: dict[tuple[int, int], int] = {}
        self.next_step = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.next_step
        self.next_step += 1
        for slot in plan.released_slots:
            del self.rows[slot]
        for new in plan.new_rows:
            assert 0 <= new.slot < self.max_rows
            assert new.slot not in self.rows
            assert new.num_computed_tokens < len(new.token_ids)
            self.rows[new.slot] = {
                "new": new,
                "tokens": list(new.token_ids),
                "computed": new.num_computed_tokens,
                "tables": [list(ids) for ids in new.block_ids],
            }
        assert sum(a.num_tokens for a in plan.advances) <= self.step_tokens
        assert len({a.slot for a in plan.advances}) == len(plan.advances)
        sampled: list[list[int]] = []
        scores: list[PromptLogprobs] = []
        written: set[int] = set()
        for advance in plan.advances:
            row = self.rows[advance.slot]
            for table, ids in zip(
                row["tables"], advance.new_block_ids or ((),) * len(self.groups), strict=True
            ):
                table.extend(ids)
            written |= self.write(row, advance.num_tokens, written)
            self.read(row)
            if row["new"].sampling.prompt_logprobs is not None:
                scores += self.score(row, advance.slot, advance.num_tokens)
            assert advance.wants_logits == (row["computed"] == len(row["tokens"]))
            if advance.wants_logits:
                banned = len(row["tokens"]) < row["new"].banned_until
                token = next_token(hash_of(row["tokens"]), banned)
                row["tokens"].append(token)
                sampled.append([token])
        return StepResult(plan.epoch, plan.step, sampled, None, scores)

    def write(self, row: dict[str, Any], count: int, written: set[int]) -> set[int]:
        start, mine = row["computed"], set()
        assert start + count <= len(row["tokens"])
        context = hash_of(row["tokens"][:start])
        for position in range(start, start + count):
            context = chained(context, row["tokens"][position])
            for table in row["tables"]:
                block = table[position // BLOCK]
                assert block not in written, "two rows write one block"
                mine.add(block)
                self.memory[block, position % BLOCK] = context
        row["computed"] = start + count
        return mine

    def read(self, row: dict[str, Any]) -> None:
        """The last query sees its window or chunk; earlier ones see what was there before the step."""
        contexts, context = [], 1
        for token in row["tokens"][: row["computed"]]:
            context = chained(context, token)
            contexts.append(context)
        for kv_group, table in zip(self.groups, row["tables"], strict=True):
            first = first_seen(kv_group, row["computed"] - 1)
            for position in range(first, row["computed"]):
                held = self.memory.get((table[position // BLOCK], position % BLOCK))
                assert held == contexts[position], f"position {position} of {kv_group.name} is not there"

    def score(self, row: dict[str, Any], slot: int, count: int) -> list[PromptLogprobs]:
        first = row["computed"] - count + 1
        until = min(row["computed"] + 1, row["new"].num_prompt_tokens)
        tokens = [TokenLogprobs(row["tokens"][p], -float(p), [], []) for p in range(first, until)]
        return [PromptLogprobs(slot, first, tokens)] if tokens else []


class Histories(RuleBasedStateMachine):
    """Arrivals, results, cancels, stop strings, deadlines and faults in any order."""

    @initialize(
        num_blocks=st.integers(6, 40),
        max_rows=st.integers(1, 6),
        more_tokens=st.integers(0, 12),
        pp=st.integers(1, 3),
        windows=st.sampled_from(
            [
                (None,),
                (None,),
                (None, 5),
                (6,),
                (None, 3, 9),
                (None, -8, -8, -8),
                (None, -10),
                (-6, -6),
                (4, -4),
            ]
        ),
    )
    def start(
        self, num_blocks: int, max_rows: int, more_tokens: int, pp: int, windows: tuple[int | None, ...]
    ) -> None:
        self.groups = tuple(group(f"g{i}", w) for i, w in enumerate(windows))
        self.kv = KVManager(num_blocks, BLOCK, self.groups)
        config = SchedulerConfig(1, max_rows, max_rows + more_tokens, 64, pp, max_waiting=12)
        self.scheduler = Scheduler(config, self.kv)
        self.config = config
        self.rank = Rank(self.groups, max_rows, config.step_tokens)
        self.plans: deque[StepPlan] = deque()
        self.touched: deque[dict[int, set[int]]] = deque()
        self.requests: list[Request] = []
        self.outputs: dict[Request, list[int]] = {}
        self.ends: dict[Request, End] = {}
        self.scored: dict[Request, list[int]] = {}
        self.now = 0.0
        self.epoch = 1

    def take(self, outputs: list[RequestOutput | None]) -> None:
        for output in outputs:
            if output is None:
                continue
            request = output.request
            assert request not in self.ends, "something came after the terminal output"
            self.outputs[request] += output.token_ids
            if output.prompt_logprobs is not None:
                start, scores = output.prompt_logprobs
                assert start == len(self.scored[request]) + 1
                self.scored[request] += [score.token_id for score in scores]
            if output.end is not None:
                self.ends[request] = output.end
                assert (output.error is not None) == (output.end is End.FAILED)

    @rule(
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 24),
        seed=st.integers(0, 3),
        salt=st.sampled_from(["", "", "a"]),
        priority=st.integers(-3, 3),
        min_tokens=st.integers(0, 3),
        stops=st.booleans(),
        timeout=st.none() | st.floats(0.1, 30),
        scores=st.booleans(),
    )
    def arrive(self, length: int, max_tokens: int, seed: int, salt: str, scores: bool, **how: Any) -> None:
        # Few seeds: prompts share prefixes.
        prompt = [(seed * 5 + i * (1 + seed)) % VOCAB for i in range(length)]
        request = Request(
            id=str(len(self.requests)),
            prompt_ids=prompt,
            sampling=SamplingParams(seed=0, prompt_logprobs=0 if scores else None),
            max_tokens=max_tokens,
            min_tokens=min(how["min_tokens"], max_tokens),
            stop_token_ids=frozenset([STOP]) if how["stops"] else frozenset(),
            priority=how["priority"],
            arrival_s=self.now,
            deadline_s=None if how["timeout"] is None else self.now + how["timeout"],
            cache_salt=salt,
            sink=None,  # type: ignore[arg-type]
        )
        if not how["stops"]:
            request.min_tokens = 0
        try:
            self.scheduler.add(request)
        except (QueueFullError, ContextTooLongError):
            return
        self.requests.append(request)
        self.outputs[request], self.scored[request] = [], []

    def send(self) -> bool:
        plan = self.scheduler.plan(self.now)
        if plan is None:
            # Nobody else would ask again.
            assert self.plans or self.scheduler.is_idle, "nothing is in flight and nothing is planned"
            return False
        assert len(self.plans) < self.config.depth
        live = {b for step in self.touched for blocks in step.values() for b in blocks}
        new = {b for row in plan.advances for ids in row.new_block_ids or () for b in ids}
        assert not new & live, "a block is given out that a step in flight may still touch"
        if self.config.pp > 1:
            total = self.scheduler.num_running + self.scheduler.num_waiting
            assert len(plan.advances) <= max(-(-total // self.config.pp), 1)
        by_slot = {r.slot: r for r in self.scheduler._running}
        self.touched.append({a.slot: self.seen(by_slot[a.slot], a.num_tokens) for a in plan.advances})
        self.plans.append(plan)
        return True

    def seen(self, request: Request, count: int) -> set[int]:
        """Return the blocks that a row's next ``count`` tokens read or write."""
        start = request.num_computed - count
        found = set()
        for kv_group, table in zip(self.groups, request.holding.tables, strict=True):
            first = first_seen(kv_group, start) // BLOCK
            found |= set(table[first : -(-request.num_computed // BLOCK)])
        return found

    @rule()
    def plan(self) -> None:
        self.send()

    def receive(self) -> None:
        result = self.rank.run(self.plans.popleft())
        self.touched.popleft()
        self.take(list(self.scheduler.commit(result)))

    @precondition(lambda self: self.plans)
    @rule()
    def result(self) -> None:
        self.receive()

    @rule()
    def overlap(self) -> None:
        """The engine's usual turn: fill the pipe, take one result."""
        while self.send():
            pass
        if self.plans:
            self.receive()

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 1000), stop=st.booleans())
    def end_early(self, which: int, stop: bool) -> None:
        request = self.requests[which % len(self.requests)]
        if stop and self.outputs[request]:
            self.take([self.scheduler.finish(request, End.STOP)])
        elif not stop:
            self.take([self.scheduler.cancel(request)])

    @rule(seconds=st.floats(0, 5))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        due = self.scheduler.next_deadline()
        outputs = self.scheduler.expire(self.now)
        assert bool(outputs) == (due is not None and due <= self.now)
        self.take(list(outputs))

    @rule()
    def fault(self) -> None:
        late = [self.rank.run(plan) for plan in self.plans]
        self.plans.clear()
        self.touched.clear()
        self.epoch += 1
        self.scheduler.restart(self.epoch)
        self.rank = Rank(self.groups, self.config.max_rows, self.config.step_tokens)
        for result in late:
            assert self.scheduler.commit(result) == []

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            needs = BlockNeeds(self.groups, BLOCK, self.config.step_tokens * self.config.depth)
            for request in self.scheduler._running:
                holding = request.holding
                for at, kv_group in enumerate(self.groups):
                    held = len(holding.tables[at]) - holding.num_let_go[at]
                    assert held <= needs.of_group(kv_group, holding.capacity), (kv_group, request)
            for request in self.requests:
                answer = right_answer(request)
                got = self.outputs[request]
                assert got == answer[: len(got)]
                if request in self.ends:
                    assert request.state is RequestState.ENDED

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # When arrivals stop, everything comes to its end within a bounded number of steps.
        work = sum(len(r.prompt_ids) + r.max_tokens for r in self.requests) + 1
        for _ in range(20 * work + 100):
            while self.send():
                pass
            if not self.plans:
                break
            self.receive()
            self.scheduler.check()
        assert self.scheduler.is_idle
        self.scheduler.check()
        for request in self.requests:
            assert request in self.ends, "a request without a terminal output"
            is_whole = self.outputs[request] == right_answer(request)
            assert is_whole or self.ends[request] is not End.LENGTH
            if is_whole and request.sampling.prompt_logprobs is not None:
                assert self.scored[request] == request.prompt_ids[1:]
        assert self.kv.num_available == self.kv.num_blocks


def run(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Histories,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_histories() -> None:
    run(examples=60, steps=40)


@pytest.mark.long
def test_many_random_histories() -> None:
    run(examples=int(os.environ.get("TANDEM_HISTORIES", "3000")), steps=80)


def drive(scheduler: Scheduler, rank: Rank, now: float = 0.0) -> list[RequestOutput]:
    """Run one step to its result."""
    plan = scheduler.plan(now)
    return [] if plan is None else scheduler.commit(rank.run(plan))


def request_of(prompt: list[int], arrival_s: float, priority: int = 0, max_tokens: int = 6) -> Request:
    return Request(
        str(arrival_s),
        prompt,
        SamplingParams(seed=0),
        max_tokens,
        0,
        frozenset(),
        priority,
        arrival_s,
        None,
        "",
        None,  # type: ignore[arg-type]
    )


def test_nobody_starves_behind_those_of_higher_priority() -> None:
    groups = (group("g"),)
    scheduler = Scheduler(SchedulerConfig(1, 1, 8, 64, 1, 100), KVManager(40, BLOCK, groups))
    rank = Rank(groups, 1, 8)
    low = request_of([1, 2, 3], 0.0, priority=-5)
    scheduler.add(low)
    ended_s = None
    for second in range(30):
        scheduler.add(request_of([second % VOCAB, 4], float(second), priority=5, max_tokens=2))
        for _ in range(2):
            if any(output.request is low and output.end for output in drive(scheduler, rank, second)):
                ended_s = second
    # It is 10 points behind: only those that came within 10 × AGE_S after it may go first.
    assert ended_s is not None
    assert 10 * AGE_S <= ended_s <= 2 * 10 * AGE_S + 8


def test_a_long_prompt_does_not_hold_up_running_rows() -> None:
    groups = (group("g"),)
    scheduler = Scheduler(SchedulerConfig(1, 4, 6, 64, 1, 100), KVManager(40, BLOCK, groups))
    rank = Rank(groups, 4, 6)
    short = request_of([1], 0.0, max_tokens=20)
    scheduler.add(short)
    drive(scheduler, rank)
    scheduler.add(request_of([5] * 40, 1.0))
    for _ in range(12):
        outputs = drive(scheduler, rank)
        assert any(o.request is short and len(o.token_ids) == 1 for o in outputs)


def test_a_prefix_is_found_within_a_salt_only_and_one_token_is_computed() -> None:
    groups = (group("g"),)
    scheduler = Scheduler(SchedulerConfig(1, 4, 32, 64, 1, 100), KVManager(40, BLOCK, groups))
    rank = Rank(groups, 4, 32)
    prompt = [1, 2, 3, 4, 5, 6, 1, 2]
    cached = []
    for salt in ("", "", "other", "other"):
        request = request_of(prompt, 0.0, max_tokens=2)
        request.cache_salt = salt
        scheduler.add(request)
        while not scheduler.is_idle:
            drive(scheduler, rank)
        cached.append(request.num_cached)
    assert cached == [0, 4, 0, 4]


def test_the_error_at_the_end_reaches_everybody_once() -> None:
    groups = (group("g"),)
    scheduler = Scheduler(SchedulerConfig(1, 2, 8, 64, 1, 100), KVManager(40, BLOCK, groups))
    requests = [request_of([1, 2, 3], float(i)) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    scheduler.plan(0.0)
    outputs = scheduler.fail_all(InstanceFailedError("gone"))
    assert {output.request for output in outputs} == set(requests)
    assert len(outputs) == 5
    assert scheduler.fail_all(InstanceFailedError("gone")) == []
