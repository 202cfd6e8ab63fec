"""The first steps of a rank on a GPU: the largest first, so that its memory is taken before KV's.

Every rank runs the same steps. A step's time is that of the whole pipeline: barrier to barrier.
"""

import time

import torch

from models.spec import ModelSpec
from protocol.control import Advance, NewRow, StepPlan, StepResult
from protocol.sampling import SamplingParams
from worker.assemble import RankLimits
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.runner import CudaRunner
from worker.steps import StepTimes


def warm_blocks(limits: RankLimits) -> int:
    """Return the blocks that the warm-up's largest step writes."""
    return sum(-(-tokens // limits.block_tokens) for tokens in _largest(limits))


def _largest(limits: RankLimits) -> list[int]:
    """Return the tokens of each row of a step that is as large as may be in tokens and in rows."""
    rows = min(limits.max_rows, limits.step_tokens)
    each = min(limits.step_tokens // rows, limits.context)
    lengths = [each] * rows
    left = limits.step_tokens - sum(lengths)
    lengths[0] = min(each + left, limits.context)
    # No more than the pool holds.
    room = limits.num_blocks
    kept: list[int] = []
    for tokens in lengths:
        tokens = min(tokens, room * limits.block_tokens)
        if tokens < 1:
            break
        kept.append(tokens)
        room -= -(-tokens // limits.block_tokens)
    return kept


class CudaWarmUp:
    """Drives a runner through plans of its own making, and leaves it without rows."""

    def __init__(
        self, runner: CudaRunner, comm: CudaCommunicator, spec: ModelSpec, limits: RankLimits
    ) -> None:
        self._runner, self._comm, self._spec, self._limits = runner, comm, spec, limits
        self._step = 0
        self._error: Exception | None = None

    def run(self) -> StepTimes:
        """Run the steps twice, the first time for what is made once."""
        lengths = _largest(self._limits)
        self._time(lengths)
        largest_s = self._time(lengths)
        one_s = min(self._time([1]) for _ in range(3))
        self._runner.reset()
        tokens = sum(lengths)
        # A token costs its products and its attention, at most that of the longest context.
        flops = self._spec.flops_per_token
        share = (flops + self._attention_flops(self._limits.context)) / (
            flops + self._attention_flops(tokens / len(lengths) / 2)
        )
        return StepTimes(one_s, max(largest_s / tokens * share, 1e-9))

    def _attention_flops(self, context: float) -> float:
        """Return 2 × the multiply-adds of one token's scores and sums over a context, all layers."""
        return sum(
            2.0 * self._spec.heads * (g.key_dim + g.value_dim) * g.most_seen(context) * len(g.layers)
            for g in self._spec.kv_groups
        )

    def _time(self, lengths: list[int]) -> float:
        rows, first = [], 0
        for slot, tokens in enumerate(lengths):
            count = -(-tokens // self._limits.block_tokens)
            rows.append(self._row(slot, tokens, list(range(first, first + count))))
            first += count
        advances = [Advance(row.slot, len(row.token_ids), None, wants_logits=True) for row in rows]
        self._comm.barrier()
        torch.cuda.synchronize()
        began_s = time.monotonic()
        self._plan(StepPlan(0, self._step, [], rows, advances))
        torch.cuda.synchronize()
        self._comm.barrier()
        took_s = time.monotonic() - began_s
        if self._error is not None:
            raise self._error
        self._plan(StepPlan(0, self._step, [row.slot for row in rows], [], []))
        return took_s

    def _row(self, slot: int, tokens: int, blocks: list[int]) -> NewRow:
        return NewRow(
            slot=slot,
            token_ids=[0] * tokens,
            num_prompt_tokens=tokens,
            num_computed_tokens=0,
            block_ids=(blocks,) * len(self._spec.kv_groups),
            sampling=SamplingParams(top_p=0.9, seed=0),
            banned_token_ids=[],
            banned_until=0,
        )

    def _plan(self, plan: StepPlan) -> None:
        self._runner.step(plan, self._answered)
        self._step += 1

    def _answered(self, found: StepResult | Exception) -> None:
        if isinstance(found, Exception):
            self._error = found
