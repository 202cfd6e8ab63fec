"""Stages work on disjoint rows: whose turn a step is, and that it is everybody's in time."""

from collections import deque

import pytest

from kv.manager import KVManager
from orchestrator.request import Request
from orchestrator.scheduler import Scheduler, SchedulerConfig
from protocol.control import StepPlan
from tests.unit.test_scheduler_histories import BLOCK, Rank, group, request_of

MAX_ROWS = 4
TOKENS = 60


class Pipeline:
    """A scheduler and its rank, with as many steps in flight as there may be."""

    def __init__(
        self, pp: int, step_tokens: int = 8, num_blocks: int = 200, max_rows: int = MAX_ROWS
    ) -> None:
        groups = (group("g"),)
        config = SchedulerConfig(1, max_rows, step_tokens, 64, pp, max_waiting=100)
        self.scheduler = Scheduler(config, KVManager(num_blocks, BLOCK, groups))
        self.rank = Rank(groups, max_rows, step_tokens)
        self.plans: deque[StepPlan] = deque()
        self.counts: dict[Request, int] = {}

    def add(self, prompt: list[int], max_tokens: int | None = None) -> Request:
        max_tokens = TOKENS - len(prompt) if max_tokens is None else max_tokens
        request = request_of(prompt, float(len(self.counts)), max_tokens=max_tokens)
        self.scheduler.add(request)
        self.counts[request] = 0
        return request

    def turn(self) -> StepPlan:
        """Fill the pipeline, and take one step's result; return its plan."""
        self.fill()
        return self.take()

    def fill(self) -> None:
        """Plan until there is nothing to run or enough is in flight."""
        while (plan := self.scheduler.plan(0.0)) is not None:
            self.plans.append(plan)

    def take(self) -> StepPlan:
        """Take the oldest step's result; return its plan."""
        done = self.plans.popleft()
        for output in self.scheduler.commit(self.rank.run(done)):
            self.counts[output.request] += len(output.token_ids)
        return done


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("num_first", [1, 2, 3])
def test_rows_that_run_keep_nobody_out_while_there_is_a_slot(pp: int, num_first: int) -> None:
    pipeline = Pipeline(pp)
    first = [pipeline.add([1, 2, 3]) for _ in range(num_first)]
    for _ in range(4 * pp):
        pipeline.turn()
    before = {request: pipeline.counts[request] for request in first}
    late = [pipeline.add([4, 5]) for _ in range(MAX_ROWS - num_first)]
    waiting = pipeline.add([6])
    for _ in range(8 * pp):
        pipeline.turn()
    assert pipeline.scheduler.num_running == MAX_ROWS
    assert all(pipeline.counts[request] > before[request] for request in first)
    assert all(pipeline.counts[request] > 1 for request in late)
    assert pipeline.counts[waiting] == 0


@pytest.mark.parametrize("pp", [2, 3, 4])
def test_rows_take_turns(pp: int) -> None:
    pipeline = Pipeline(pp)
    for _ in range(MAX_ROWS):
        pipeline.add([1])
    for _ in range(4 * pp):
        pipeline.turn()
    slots = [{advance.slot for advance in pipeline.turn().advances} for _ in range(3 * pp)]
    per_step = -(-MAX_ROWS // pp)
    assert all(len(step) <= per_step for step in slots)
    counts = [sum(slot in step for step in slots) for slot in range(MAX_ROWS)]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("pp", [2, 3])
def test_a_long_prompt_that_comes_in_leaves_the_others_their_tokens(pp: int) -> None:
    pipeline = Pipeline(pp, step_tokens=MAX_ROWS)
    short = pipeline.add([1])
    pipeline.add([2])
    for _ in range(4 * pp):
        pipeline.turn()
    long = pipeline.add([3] * 40)
    counts = []
    while not pipeline.counts[long]:
        pipeline.turn()
        counts.append(pipeline.counts[short])
    # It had a turn at least every third step, as one of three rows.
    assert all(later > earlier for earlier, later in zip(counts, counts[3:], strict=False))


@pytest.mark.parametrize("pp", [1, 2, 3])
def test_a_row_that_gave_way_does_not_take_back_what_it_gave(pp: int) -> None:
    # Each begins with one of three blocks and grows to two, so the second gives way. With stages the queue
    # asks before rows that run: it asks for its blocks again before the first has taken one of them.
    pipeline = Pipeline(pp, step_tokens=2, num_blocks=3, max_rows=2)
    first, second = pipeline.add([1], max_tokens=6), pipeline.add([2, 2, 2], max_tokens=5)
    for _ in range(40):
        if pipeline.scheduler.is_idle:
            break
        pipeline.turn()
    assert (pipeline.counts[first], pipeline.counts[second]) == (6, 5)
    assert pipeline.scheduler.counters.preemptions == 1


def test_when_a_row_gives_way_in_its_own_turn_the_next_one_has_it() -> None:
    # One row a step. The second's turn comes when all results are in, and no block is left for it.
    pipeline = Pipeline(2, step_tokens=6, num_blocks=2, max_rows=2)
    first, second = pipeline.add([1, 1], max_tokens=3), pipeline.add([2, 2, 2, 2], max_tokens=4)
    for _ in range(20):
        pipeline.fill()
        assert pipeline.plans or pipeline.scheduler.is_idle, "requests wait, and no step can run"
        while pipeline.plans:
            pipeline.take()
    assert (pipeline.counts[first], pipeline.counts[second]) == (3, 4)
