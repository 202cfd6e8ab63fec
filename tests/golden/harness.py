"""Ranks as threads of one process, driven by step plans made by hand.

The driver chunks prompts, batches rows, keeps several steps in flight and hands out blocks in a
shuffled order, so that every layout sees scattered blocks and placeholders for unknown tokens.
"""

import mmap
import queue
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from loader.index import check_against, read_index
from loader.plan import plan_load
from loader.reader import load
from models.layout import arena, cut_stages
from models.registry import load_spec
from models.spec import ModelSpec
from protocol.control import Advance, NewRow, StepPlan, StepResult, TokenLogprobs
from protocol.sampling import SamplingParams
from protocol.topology import Topology
from worker.assemble import RankLimits, assemble
from worker.comm import Communicator, ThreadCommunicator, thread_group
from worker.runner import Runner

WAIT_S = 60.0
GREEDY = SamplingParams(temperature=0.0, seed=0, logprobs=0)


@dataclass
class Instance:
    """One model over ranks that are threads. Plans go in by ``send``; ``result`` waits for an answer."""

    topology: Topology
    spec: ModelSpec
    limits: RankLimits
    _plans: list["queue.Queue[StepPlan | None]"]
    _results: "queue.Queue[StepResult | BaseException]"
    num_steps: int = 0

    def send(self, plan: StepPlan) -> None:
        self.num_steps += 1
        for plans in self._plans:
            plans.put(plan)

    def result(self) -> StepResult:
        found = self._results.get(timeout=WAIT_S)
        if isinstance(found, BaseException):
            raise found
        return found


@contextmanager
def run_ranks_as_threads(
    directory: Path,
    topology: Topology,
    *,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    max_rows: int = 32,
    step_tokens: int = 512,
    logit_rows: int = 8,
    num_blocks: int = 128,
    block_tokens: int = 4,
    context: int = 256,
    kv_groups: int = 1,
) -> Iterator[Instance]:
    """Load a model directory once per layout and run its ranks until the block ends.

    ``kv_groups`` deals the layers out to that many groups, each under a block table of its own.
    """
    spec = load_spec(directory, dtype, kv_dtype)
    if kv_groups > 1:
        (whole,) = spec.kv_groups
        groups = tuple(
            msgspec.structs.replace(whole, name=f"part {g}", layers=whole.layers[g::kv_groups])
            for g in range(kv_groups)
        )
        spec = msgspec.structs.replace(spec, kv_groups=groups)
    checkpoint = read_index(directory)
    check_against(spec, checkpoint)
    stages = cut_stages(spec, topology, 1 << 30)
    plan = plan_load(spec, checkpoint, topology, stages)
    memories = [mmap.mmap(-1, size) for size in plan.arena_bytes]
    views = {rank: memoryview(memory) for rank, memory in enumerate(memories)}
    for rank in range(topology.world_size):
        load(plan, rank, views, threads=1)
    limits = RankLimits(
        max_rows,
        step_tokens,
        logit_rows,
        min(context, spec.max_context),
        num_blocks,
        topology.whole_block(block_tokens),
        1 << 34,
    )
    results: queue.Queue[StepResult | BaseException] = queue.Queue()
    plans: list[queue.Queue[StepPlan | None]] = [queue.Queue() for _ in range(topology.world_size)]

    def build(comm: Communicator) -> Runner:
        held = arena(spec, topology, stages, comm.rank)
        return assemble(spec, held, memories[comm.rank], stages, comm, limits).runner

    comms = thread_group(topology)
    threads = [
        threading.Thread(target=_rank, args=(comm, build, plans[comm.rank], results), daemon=True)
        for comm in comms
    ]
    for thread in threads:
        thread.start()
    try:
        yield Instance(topology, spec, limits, plans, results)
    finally:
        for waiting in plans:
            waiting.put(None)
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)


def _rank(
    comm: ThreadCommunicator,
    build: Callable[[Communicator], Runner],
    plans: "queue.Queue[StepPlan | None]",
    results: "queue.Queue[StepResult | BaseException]",
) -> None:
    try:
        runner = build(comm)
        while (plan := plans.get()) is not None:
            runner.step(plan, results.put)
    except BaseException as error:
        results.put(error)
        comm.abort()
    finally:
        comm.close()


@dataclass(eq=False)
class Job:
    """One request of the driver; what came of it is in ``output_ids`` and ``logprobs``."""

    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams = GREEDY
    start_step: int = 0
    """Not planned before this many of the driver's steps."""
    preempt_at: int | None = None
    """Taken out once, with its blocks, when this many tokens are there, and computed again."""
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_scores: dict[int, TokenLogprobs] = field(default_factory=dict)

    slot: int = -1
    computed: int = 0
    in_flight: int = 0
    tables: list[list[int]] = field(default_factory=list)
    """Blocks per KV group: a block is one group's at a time."""

    @property
    def known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_done(self) -> bool:
        return len(self.output_ids) >= self.max_tokens


class Driver:
    """A scheduler of the simplest kind: every job at once, chunk by chunk."""

    def __init__(
        self, instance: Instance, *, chunk: int = 64, depth: int = 1, seed: int | None = 0
    ) -> None:
        """``seed`` shuffles the free blocks; None hands them out in order."""
        self.instance, self.chunk, self.depth = instance, chunk, depth
        self.free = list(range(instance.limits.num_blocks))
        if seed is not None:
            random.Random(seed).shuffle(self.free)
        self.free.reverse()
        self.slots = list(range(instance.limits.max_rows))
        self.released: list[int] = []
        self.step = instance.num_steps

    def run(self, jobs: list[Job]) -> None:
        """Run jobs to their ends and give everything back."""
        in_flight: deque[list[tuple[Job, Advance]]] = deque()
        began = self.step
        while True:
            rows = self._plan([j for j in jobs if self.step - began >= j.start_step])
            if rows is not None:
                in_flight.append(rows)
            if not in_flight and all(job.is_done for job in jobs):
                break
            if len(in_flight) >= self.depth or rows is None:
                self._commit(in_flight.popleft(), self.instance.result())
        for job in jobs:
            if job.slot >= 0:
                self._release(job)
        self._send([], [])
        self.instance.result()

    def _plan(self, jobs: list[Job]) -> list[tuple[Job, Advance]] | None:
        new_rows: list[NewRow] = []
        rows: list[tuple[Job, Advance]] = []
        left = self.instance.limits.step_tokens
        for job in jobs:
            known = job.known + job.in_flight
            planned = len(job.output_ids) + job.in_flight
            if planned >= job.max_tokens or left == 0:
                continue
            if job.preempt_at is not None and job.slot >= 0 and len(job.output_ids) >= job.preempt_at:
                if job.in_flight:
                    continue
                self._release(job)
                job.preempt_at = None
            count = min(known - job.computed, self.chunk, left)
            blocks = self._blocks(job, job.computed + count)
            if job.slot < 0:
                job.slot = self.slots.pop(0)
                assert blocks is not None
                new_rows.append(self._new_row(job, blocks))
                blocks = None
            wants = job.computed + count == known
            rows.append((job, Advance(job.slot, count, blocks, wants)))
            job.computed += count
            job.in_flight += wants
            left -= count
        if not rows:
            return None
        self._send(new_rows, [advance for _, advance in rows])
        return rows

    def _new_row(self, job: Job, blocks: tuple[list[int], ...]) -> NewRow:
        return NewRow(
            slot=job.slot,
            token_ids=job.prompt_ids + job.output_ids,
            num_prompt_tokens=len(job.prompt_ids),
            num_computed_tokens=job.computed,
            block_ids=blocks,
            sampling=job.sampling,
            banned_token_ids=[],
            banned_until=0,
        )

    def _send(self, new_rows: list[NewRow], advances: list[Advance]) -> None:
        self.instance.send(StepPlan(1, self.step, self.released, new_rows, advances))
        self.released = []
        self.step += 1

    def _blocks(self, job: Job, tokens: int) -> tuple[list[int], ...] | None:
        """Return the new blocks of each group for ``tokens`` in all; None where no more are needed."""
        job.tables = job.tables or [[] for _ in self.instance.spec.kv_groups]
        missing = -(-tokens // self.instance.limits.block_tokens) - len(job.tables[0])
        taken = tuple([self.free.pop() for _ in range(missing)] for _ in job.tables)
        for table, new in zip(job.tables, taken, strict=True):
            table += new
        return taken if missing else None

    def _release(self, job: Job) -> None:
        self.released.append(job.slot)
        self.slots.append(job.slot)
        for table in job.tables:
            self.free[:0] = table
        job.slot, job.computed, job.tables = -1, 0, []

    def _commit(self, rows: list[tuple[Job, Advance]], result: StepResult) -> None:
        wanting = [job for job, advance in rows if advance.wants_logits]
        assert len(wanting) == len(result.token_ids), (wanting, result)
        by_slot = {job.slot: job for job, _ in rows}
        for scores in result.prompt_logprobs:
            found = enumerate(scores.tokens, scores.start)
            by_slot[scores.slot].prompt_scores.update(found)
        for index, job in enumerate(wanting):
            job.in_flight -= 1
            job.output_ids += result.token_ids[index]
            scored = result.logprobs[index] if result.logprobs is not None else None
            if scored is not None:
                job.logprobs += scored
