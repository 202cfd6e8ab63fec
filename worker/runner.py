"""Executes plans on one rank of a CPU, whatever its stage.

First stage: embeds. Any stage: receives hidden states, runs its layers, sends them on. Last stage:
logits for the rows that want them, at most ``logit_rows`` at a time; samples; sends the tokens to
the first stage without waiting. The first stage takes them when a later step needs one.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec
import torch

from models.spec import ModelSpec
from protocol.control import PromptLogprobs, StepPlan, StepResult, TokenLogprobs
from worker.backends.cpu import CpuBackend
from worker.batch import Batch, BatchLimits, Row, Scheduled
from worker.comm import Communicator
from worker.context import StepContext
from worker.expert_load import CountedLayer
from worker.models.base import StageModel
from worker.sampler import RowSampling, Sampler
from worker.steps import Answer

T = TypeVar("T")


class Runner:
    """Owner of a rank's batch, its rows' sampling state and the tokens on their way to it."""

    def __init__(
        self,
        spec: ModelSpec,
        model: StageModel,
        backend: CpuBackend,
        comm: Communicator,
        limits: BatchLimits,
        logit_rows: int,
        cache_widths: tuple[int, ...],
    ) -> None:
        """``cache_widths``: elements of a cache line, per KV group."""
        topology = comm.topology
        self.limits = limits
        self.logit_rows = logit_rows
        self._spec, self._model, self._backend, self._comm = spec, model, backend, comm
        self._widths = cache_widths
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._is_first, self._is_last = topology.is_first(comm.rank), topology.is_last(comm.rank)
        self._is_sampling_rank = comm.rank == topology.sampling_rank
        # More steps than are ever in flight: the oldest of them is committed, so its tokens are here.
        self._most_awaited = topology.pp + 1
        self._sampler = Sampler(spec.vocab_size, comm, logit_rows) if self._is_last else None
        self.reset()

    def reset(self) -> None:
        """Forget all rows, after taking the tokens that are still on their way."""
        if hasattr(self, "_awaited"):
            while self._awaited:
                self._take_tokens()
        self._awaited: deque[list[Row]] = deque()
        sampling: dict[int, RowSampling] = {}
        is_last = self._is_last

        def on_new_row(row: Row) -> None:
            # Without ``self``: a runner that held itself would keep weights and KV until a collection.
            if is_last:
                sampling[row.slot] = RowSampling.from_new_row(row.new_row)

        self._sampling = sampling
        self._batch = Batch(self.limits, on_new_row)

    @torch.inference_mode()
    def step(self, plan: StepPlan, answer: Answer) -> None:
        """See ``StepRunner.step``; here it is done on return.

        Errors: ``ProtocolError`` for a plan that cannot be right.
        """
        began_s = time.monotonic()
        for slot in plan.released_slots:
            self._sampling.pop(slot, None)
        scheduled = self._batch.apply(plan)
        result = StepResult(plan.epoch, plan.step, [])
        if scheduled:
            hidden = self._run_stage(scheduled)
            if self._is_last:
                result = self._finish(plan, scheduled, hidden)
            else:
                self._comm.to_next_stage(hidden)
                self._await_tokens(scheduled)
        if self._is_sampling_rank:
            answer(msgspec.structs.replace(result, step_s=time.monotonic() - began_s))

    def expert_loads(self) -> Sequence[CountedLayer]:
        """See ``StepRunner.expert_loads``."""
        return self._model.expert_loads()

    def close(self) -> None:
        """See ``StepRunner.close``: nothing runs behind."""

    def _run_stage(self, scheduled: list[Scheduled]) -> torch.Tensor:
        spans = [item.span for item in scheduled]
        count = spans[-1].offset + spans[-1].count
        if self._is_first:
            hidden = self._model.embed(torch.tensor(self._step_tokens(scheduled)))
        else:
            hidden = self._comm.from_previous_stage((count, self._spec.hidden_size), self._dtype)
        positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
        attention = tuple(
            self._backend.plan_attention(spans, group, self.limits.block_tokens, width)
            for group, width in enumerate(self._widths)
        )
        return self._model.forward(hidden, StepContext(positions, attention))

    def _step_tokens(self, scheduled: list[Scheduled]) -> list[int]:
        token_ids: list[int] = []
        for item in scheduled:
            while len(item.row.token_ids) < item.span.end:
                assert self._awaited, f"slot {item.row.slot} lacks tokens that nobody sends"
                self._take_tokens()
            token_ids += item.row.token_ids[item.span.start : item.span.end]
        return token_ids

    def _await_tokens(self, scheduled: list[Scheduled]) -> None:
        rows = [item.row for item in scheduled if item.wants_logits]
        if self._is_first and rows:
            self._awaited.append(rows)
            while len(self._awaited) > self._most_awaited:
                self._take_tokens()

    def _take_tokens(self) -> None:
        rows = self._awaited.popleft()
        for row, token in zip(rows, self._comm.tokens_from_last_stage(len(rows)).tolist(), strict=True):
            row.token_ids.append(token)

    def _finish(self, plan: StepPlan, scheduled: list[Scheduled], hidden: torch.Tensor) -> StepResult:
        prompt = [
            PromptLogprobs(item.row.slot, item.span.start + 1, scores)
            for item in scheduled
            if (scores := self._score_prompt(item, hidden))
        ]
        wanting = [item for item in scheduled if item.wants_logits]
        token_ids, logprobs = self._sample(wanting, hidden)
        asked = any(one is not None for one in logprobs)
        return StepResult(
            plan.epoch,
            plan.step,
            [[token] for token in token_ids],
            [None if one is None else [one] for one in logprobs] if asked else None,
            prompt,
        )

    def _sample(
        self, wanting: list[Scheduled], hidden: torch.Tensor
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        assert self._sampler is not None
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs | None] = []
        for some in _pieces(wanting, self.logit_rows):
            last = torch.tensor([item.span.offset + item.span.count - 1 for item in some])
            sampled = self._sampler.sample(
                self._model.logits(hidden[last]),
                [self._sampling[item.row.slot] for item in some],
                [item.span.end for item in some],
            )
            token_ids += sampled.token_ids
            logprobs += sampled.logprobs
        for item, token in zip(wanting, token_ids, strict=True):
            self._sampling[item.row.slot].append(token)
            item.row.token_ids.append(token)
        if not self._is_first and token_ids:
            self._comm.tokens_to_first_stage(torch.tensor(token_ids))
        return token_ids, logprobs

    def _score_prompt(self, item: Scheduled, hidden: torch.Tensor) -> list[TokenLogprobs]:
        """Return the log-probabilities of the prompt tokens that this step's positions predict."""
        row, span = item.row, item.span
        if row.prompt_logprobs is None:
            return []
        assert self._sampler is not None
        found: list[TokenLogprobs] = []
        targets = row.token_ids[span.start + 1 : min(span.end + 1, row.num_prompt_tokens)]
        offset = span.offset
        for some in _pieces(targets, self.logit_rows):
            logits = self._model.logits(hidden[offset : offset + len(some)])
            found += self._sampler.score(logits, some, row.prompt_logprobs)
            offset += len(some)
        return found


def _pieces(items: list[T], size: int) -> Iterator[list[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
