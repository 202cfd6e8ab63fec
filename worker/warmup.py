"""The first steps of a rank: they touch every path, and measure its time and its memory.

Every rank runs the same steps, chosen from the model's arithmetic and never from the clock, so that
the collectives inside them match. A step's time is that of the whole pipeline: barrier to barrier.
"""

import time

from models.spec import ModelSpec
from protocol.control import Advance, NewRow, StepPlan
from protocol.sampling import SamplingParams
from worker.batch import BatchLimits
from worker.comm import Communicator
from worker.memory import MemoryMeter
from worker.runner import Runner
from worker.steps import StepTimes

CHUNK_FLOPS = 1.5e10
"""What the warm-up's largest chunk may cost over all ranks: below half a second on two old cores."""
LOGIT_ROWS = 8
"""Rows that sample in the warm-up; more take memory in proportion, and time that a boot need not."""
CONTEXT_TOKENS = 8192
"""The warm-up's longest context; a longer one is taken to cost in proportion."""


class WarmUp:
    """Drives a runner through plans of its own making, and leaves it without rows."""

    def __init__(self, runner: Runner, comm: Communicator, spec: ModelSpec, meter: MemoryMeter) -> None:
        self._runner, self._comm, self._spec, self._meter = runner, comm, spec, meter
        self._limits: BatchLimits = runner.limits
        self._step = 0

    def run(self) -> StepTimes:
        """Run the steps; memory goes to the meter."""
        limits, spec = self._limits, self._spec
        room = min(limits.context, limits.num_blocks * limits.block_tokens)
        chunk = min(limits.step_tokens, room, max(round(CHUNK_FLOPS / spec.flops_per_token), 16))
        # What the first products of a process load, and keep, belongs to no step.
        self._meter.growth("runtime", lambda: self._time([self._row(0, 1, 0)]))
        self._meter.growth("runtime", lambda: self._time([self._row(0, max(chunk // 4, 1), 0)]))
        first_s, chunk_s = self._meter.peak_at(
            "activations", limits.step_tokens, lambda count: self._time([self._row(0, count, 0)]), chunk
        )
        context = min(room, CONTEXT_TOKENS)
        context_s = self._meter.peak("workspace", lambda: self._time([self._row(0, context, context - 1)]))
        most_rows = min(
            limits.max_rows, limits.num_blocks, limits.step_tokens, self._runner.logit_rows, chunk
        )
        second_s, _ = self._meter.peak_at(
            "logits",
            most_rows,
            lambda count: self._time([self._row(slot, 1, 0) for slot in range(count)]),
            min(most_rows, LOGIT_ROWS),
        )
        fixed_s = min(first_s, second_s)
        self._runner.reset()
        # A token costs its products and its attention: at most that of the longest context.
        share = (spec.flops_per_token + self._attention_flops(limits.context)) / (
            spec.flops_per_token + self._attention_flops(chunk / 2)
        )
        # A decode row reads its whole context for one token, which a chunk shares among many. Charging
        # every token for that would make a chunk's deadline useless; half of it stays inside the
        # deadline's factor of five even where every row holds the longest context.
        row_s = (context_s - fixed_s) * limits.context / context
        return StepTimes(fixed_s, max(chunk_s / chunk * share, row_s / 2, 1e-9))

    def _attention_flops(self, context: float) -> float:
        """Return 2 × the multiply-adds of one token's scores and sums over a context, all layers."""
        return sum(
            2.0 * self._spec.heads * (g.key_dim + g.value_dim) * g.most_seen(context) * len(g.layers)
            for g in self._spec.kv_groups
        )

    def _row(self, slot: int, known: int, computed: int) -> NewRow:
        limits = self._limits
        count = -(-known // limits.block_tokens)
        if computed:
            # Two blocks in turn: a context that must be gathered, without touching the pool's memory.
            blocks = [(i % 2) * (limits.num_blocks - 1) for i in range(count)]
        else:
            blocks = list(range(slot, slot + count))
        return NewRow(
            slot=slot,
            token_ids=[0] * known,
            num_prompt_tokens=known,
            num_computed_tokens=computed,
            block_ids=(blocks,) * limits.num_groups,
            # A filter asks for the whole distribution, the most that sampling can take.
            sampling=SamplingParams(top_p=0.9, seed=0),
            banned_token_ids=[],
            banned_until=0,
        )

    def _time(self, rows: list[NewRow]) -> float:
        """Run new rows in one step, then release them; return the step's seconds."""
        advances = [
            Advance(row.slot, len(row.token_ids) - row.num_computed_tokens, None, wants_logits=True)
            for row in rows
        ]
        self._comm.barrier()
        began_s = time.monotonic()
        self._plan(StepPlan(0, self._step, [], rows, advances))
        self._comm.barrier()
        took_s = time.monotonic() - began_s
        self._plan(StepPlan(0, self._step, [row.slot for row in rows], [], []))
        return took_s

    def _plan(self, plan: StepPlan) -> None:
        self._runner.step(plan, lambda _: None)
        self._step += 1
