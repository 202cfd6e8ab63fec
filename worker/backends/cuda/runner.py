"""Executes plans on one GPU: what a step needs is queued, and the next plan taken while the device works.

A step whose rows all take one token is one replay of a captured graph; any other is launched kernel by
kernel. Sampled tokens stay on the device for the next step and come back by a copy that a thread waits
for. Nothing here waits for the device.
"""

import gc
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from models.spec import ModelSpec
from protocol.control import PromptLogprobs, StepPlan, StepResult
from worker.backends.cuda.attention import CudaAttention
from worker.backends.cuda.backend import CudaStepPlan
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.completions import Completions, Pending
from worker.backends.cuda.device import Device
from worker.backends.cuda.graphs import DecodeGraphs, StepKind
from worker.backends.cuda.latent import CudaLatents
from worker.backends.cuda.pieces import SIZES, Inputs, Pieces, size_for
from worker.backends.cuda.sampler import CudaSampler, SamplerOutputs
from worker.backends.cuda.step_inputs import StepInputs, StepTensors
from worker.batch import Batch, BatchLimits, Row, Scheduled
from worker.context import AttentionPlan, StepContext, Wanted
from worker.expert_load import CountedLayer
from worker.models.base import StageModel
from worker.steps import Answer


@dataclass(frozen=True, slots=True)
class _Scores:
    """Log-probabilities of some prompt tokens, on their way to the host."""

    slot: int
    start: int
    token_ids: list[int]
    k: int
    copy: torch.Tensor


class CudaRunner:
    """Owner of a rank's rows and of what the device knows of them. Used by one thread."""

    def __init__(
        self,
        spec: ModelSpec,
        model: StageModel,
        attention: tuple[CudaAttention | CudaLatents, ...],
        sampler: CudaSampler | None,
        inputs: StepInputs,
        comm: CudaCommunicator,
        limits: BatchLimits,
        device: Device,
        rungs: tuple[int, ...],
    ) -> None:
        """``attention``: by KV group; ``sampler``: on the last stage; ``rungs``: of the decode graphs."""
        topology = comm.topology
        self.limits = limits
        self._spec, self._model, self._attention, self._sampler = spec, model, attention, sampler
        self._inputs, self._comm, self._device = inputs, comm, device
        self._dtype: torch.dtype = getattr(torch, spec.dtype)
        self._is_first, self._is_last = topology.is_first(comm.rank), topology.is_last(comm.rank)
        self._is_sampling_rank = comm.rank == topology.sampling_rank
        # More steps than are ever in flight: the oldest of them is committed, so its tokens are here.
        self._most_awaited = topology.pp + 1
        self._completions = Completions(device.torch_device)
        self._graphs = DecodeGraphs(limits.max_rows, self._run_decode, rungs)
        self._pieces: dict[int, Pieces] = {}
        self._most_pieces = 0
        rows = limits.max_rows
        self._outputs = SamplerOutputs.empty(rows, device.torch_device)
        self._copies = [
            SamplerOutputs.empty(rows, torch.device("cpu"), pin_memory=True) for _ in range(topology.pp + 3)
        ]
        self.reset()

    def reset(self) -> None:
        """Forget all rows, after taking the tokens that are still on their way."""
        if hasattr(self, "_awaited"):
            while self._awaited:
                self._take_tokens()
        self._awaited: deque[list[int]] = deque()
        self._batch = Batch(self.limits, self._on_new_row)

    def grant(self, num_blocks: int) -> None:
        """Have so many KV blocks from here on; forgets all rows."""
        self.limits = replace(self.limits, num_blocks=num_blocks)
        self.reset()

    @property
    def logit_bytes(self) -> int:
        """Device memory of the largest step's logits, and of what is known of each row's sampling."""
        if self._sampler is None:
            return 0
        logits = self.limits.max_rows * 4 * self._sampler.width
        return logits + self._sampler.state.device_bytes

    def expert_loads(self) -> Sequence[CountedLayer]:
        """See ``StepRunner.expert_loads``."""
        return self._model.expert_loads()

    def close(self) -> None:
        """See ``StepRunner.close``."""
        self._completions.close()
        torch.cuda.synchronize()

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the decode graphs over padded rows: no line of the cache is written."""
        # Where all decode sizes are our own kernels', cuBLAS's first product would be a captured one,
        # and its handle cannot be made there.
        torch.cuda.current_blas_handle()  # type: ignore[no-untyped-call]
        # A graph of another life that is collected while one is captured breaks it.
        gc.collect()
        gc.disable()
        try:
            self._capture_all()
        finally:
            gc.enable()

    def _capture_all(self) -> None:
        for size in reversed(self._graphs.sizes):
            self._send_decode([], size)
            rules = product(*(attention.decode_rules(size) for attention in self._attention))
            self._graphs.capture(size, (StepKind(*kind) for kind in product((False, True), rules)))
        torch.cuda.synchronize()
        self._most_pieces = min(SIZES[-1], self.limits.step_tokens)
        for size in reversed(SIZES):
            if size <= self._most_pieces:
                self._pieces[size] = self._capture_pieces(size)

    @torch.inference_mode()
    def step(self, plan: StepPlan, answer: Answer) -> None:
        """See ``StepRunner.step``. Errors: ``ProtocolError`` for a plan that cannot be right."""
        began_s = time.monotonic()
        if self._sampler is not None:
            for slot in plan.released_slots:
                self._sampler.release(slot)
        scheduled = self._batch.apply(plan)
        updates = _table_updates(plan, scheduled)
        if updates:
            self._inputs.change_tables(np.array(updates, dtype=np.int32))
        if self._sampler is not None:
            self._sampler.upload()
        wanting = [item for item in scheduled if item.wants_logits]
        scores: list[_Scores] = []
        if scheduled:
            if self._is_first and not self._is_last:
                self._await_known(scheduled)
            if all(item.span.count == 1 and _feeds_on_sampled(item) for item in scheduled):
                self._decode(scheduled)
            else:
                scores = self._mixed(scheduled)
            if self._is_first and not self._is_last and wanting:
                self._await_tokens(wanting)
        self._answer(plan, wanting, scores, began_s, answer)

    # The two kinds of step.

    def _decode(self, scheduled: Sequence[Scheduled]) -> None:
        rows = len(scheduled)
        size = self._graphs.size_for(rows)
        self._send_decode(scheduled, size)
        mean_context = sum(item.span.end for item in scheduled) / rows
        rules = tuple(attention.decode_rule(size, mean_context) for attention in self._attention)
        self._graphs.run(size, StepKind(self._is_full(scheduled), rules))
        self._hand_back(rows)

    def _send_decode(self, scheduled: Sequence[Scheduled], size: int) -> None:
        rows = len(scheduled)
        slots = np.full(size, self.limits.max_rows, dtype=np.int32)
        starts = np.zeros(size, dtype=np.int32)
        slots[:rows] = [item.row.slot for item in scheduled]
        starts[:rows] = [item.span.start for item in scheduled]
        self._inputs.send_decode(slots, starts)

    def _run_decode(self, rows: int, kind: StepKind) -> None:
        """Launch a decode step of so many rows, padded ones among them; what a graph captures."""
        inputs = self._inputs.decode(rows)
        plans = tuple(
            CudaStepPlan(
                inputs.lines[group],
                attention.plan_decode(
                    rows,
                    inputs.slots,
                    inputs.kv_lengths,
                    self._inputs.block_tables[group],
                    kind.rules[group],
                ),
            )
            for group, attention in enumerate(self._attention)
        )
        hidden = self._run_stage(inputs.token_ids, StepContext(inputs.positions, plans))
        if self._sampler is not None:
            # The noise of a token is keyed by how many its row knows.
            logits = self._model.logits(hidden)
            self._sampler.sample(logits, inputs.slots, inputs.kv_lengths, self._outputs, kind.is_full)

    def _mixed(self, scheduled: Sequence[Scheduled]) -> list[_Scores]:
        wanting = [item for item in scheduled if item.wants_logits]
        token_ids: list[int] = []
        for item in scheduled:
            known = item.row.token_ids[item.span.start : item.span.end]
            # A token that is not here is the one that the device sampled last.
            token_ids += known or [-1]
        inputs = self._inputs.mixed(
            slots=np.array([item.row.slot for item in scheduled], dtype=np.int32),
            starts=np.array([item.span.start for item in scheduled], dtype=np.int32),
            counts=np.array([item.span.count for item in scheduled], dtype=np.int32),
            token_ids=np.array(token_ids, dtype=np.int32),
            logit_tokens=np.array(
                [item.span.offset + item.span.count - 1 for item in wanting], dtype=np.int32
            ),
        )
        q_starts = [*(item.span.offset for item in scheduled), len(token_ids)]
        kv_lengths = [item.span.end for item in scheduled]
        plans: tuple[AttentionPlan, ...] = tuple(
            attention.plan_mixed(
                q_starts,
                kv_lengths,
                inputs.slots,
                inputs.q_starts,
                inputs.kv_lengths,
                self._inputs.block_tables[group],
                [item.span.tables[group].first_of_run for item in scheduled],
            )
            for group, attention in enumerate(self._attention)
        )
        scored = [item for item in scheduled if item.row.prompt_logprobs is not None]
        pieces = self._pieces.get(size_for(len(token_ids), self._most_pieces) or 0)
        wanted = None
        if pieces is not None:
            hidden = self._run_pieces(pieces, inputs, plans)
        else:
            if self._sampler is not None and wanting and not scored:
                mean_context = sum(item.span.end for item in wanting) / len(wanting)
                wanted = self._plan_wanted(inputs, len(wanting), mean_context)
            planned = tuple(
                CudaStepPlan(lines, plan) for lines, plan in zip(inputs.lines, plans, strict=True)
            )
            step = StepContext(inputs.positions, planned, wanted)
            hidden = self._run_stage(inputs.token_ids, step)
        if self._sampler is None:
            return []
        if wanting:
            self._sampler.sample(
                self._model.logits(
                    hidden.index_select(0, inputs.logit_tokens) if wanted is None else hidden
                ),
                inputs.logit_slots,
                inputs.logit_lengths,
                self._outputs,
                self._is_full(wanting),
            )
            self._hand_back(len(wanting))
        return self._score_prompts(scored, hidden)

    def _plan_wanted(self, inputs: StepTensors, count: int, mean_context: float) -> Wanted:
        """Plan the attention of each row's last token alone: a decode step's."""
        plans = []
        for group, attention in enumerate(self._attention):
            rule = attention.decode_rule(count, mean_context)
            tables = self._inputs.block_tables[group]
            plan = attention.plan_decode(
                count, inputs.logit_slots, inputs.logit_lengths, tables, rule, is_beside_mixed=True
            )
            plans.append(CudaStepPlan(inputs.lines[group], plan))
        return Wanted(inputs.logit_tokens, tuple(plans))

    def _run_pieces(
        self, pieces: Pieces, inputs: StepTensors, plans: tuple[AttentionPlan, ...]
    ) -> torch.Tensor:
        tokens = inputs.token_ids.shape[0]
        static = pieces.inputs
        static.token_ids[:tokens].copy_(inputs.token_ids)
        static.positions[:tokens].copy_(inputs.positions)
        static.lines.fill_(-1)
        static.lines[:, :tokens].copy_(inputs.lines)
        return pieces.run(tokens, plans)

    def _capture_pieces(self, size: int) -> Pieces:
        device, groups = self._device.torch_device, len(self._attention)
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        lines = torch.full((groups, size), -1, dtype=torch.int64, device=device)
        pieces = Pieces(Inputs(zeros, torch.zeros_like(zeros), lines))
        static = pieces.inputs

        def forward(between: Pieces) -> torch.Tensor:
            plans = tuple(CudaStepPlan(lines, between) for lines in static.lines)
            return self._run_stage(static.token_ids, StepContext(static.positions, plans))

        pieces.capture(self._graphs.pool, forward)
        return pieces

    def _run_stage(self, token_ids: torch.Tensor, step: StepContext) -> torch.Tensor:
        if self._is_first:
            hidden = self._model.embed(token_ids)
        else:
            shape = (step.positions.shape[0], self._spec.hidden_size)
            hidden = self._comm.from_previous_stage(shape, self._dtype)
        hidden = self._model.forward(hidden, step)
        if not self._is_last:
            self._comm.to_next_stage(hidden)
        return hidden

    def _is_full(self, items: Sequence[Scheduled]) -> bool:
        return self._sampler is not None and self._sampler.is_full(item.row.slot for item in items)

    def _on_new_row(self, row: Row) -> None:
        if self._sampler is not None:
            self._sampler.new_row(row.slot, row.new_row)

    # What comes back.

    def _score_prompts(self, scored: Sequence[Scheduled], hidden: torch.Tensor) -> list[_Scores]:
        """Queue the log-probabilities of the prompt tokens that this step's positions predict."""
        assert self._sampler is not None
        found: list[_Scores] = []
        for item in scored:
            row, span, k = item.row, item.span, item.row.prompt_logprobs
            assert k is not None
            targets = row.token_ids[span.start + 1 : min(span.end + 1, row.num_prompt_tokens)]
            for first in range(0, len(targets), self.limits.max_rows):
                some = targets[first : first + self.limits.max_rows]
                offset = span.offset + first
                ids = torch.tensor(some, dtype=torch.int32, pin_memory=True)
                scores = self._sampler.score(
                    self._model.logits(hidden[offset : offset + len(some)]),
                    ids.to(self._device.torch_device, non_blocking=True),
                    k,
                )
                copy = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True)
                copy.copy_(scores, non_blocking=True)
                found.append(_Scores(row.slot, span.start + 1 + first, some, k, copy))
        return found

    def _answer(
        self,
        plan: StepPlan,
        wanting: Sequence[Scheduled],
        scores: Sequence[_Scores],
        began_s: float,
        answer: Answer,
    ) -> None:
        """Have the step's end waited for, and its result read, by the thread that does that."""
        sampler = self._sampler if self._is_sampling_rank else None
        asked: list[int | None] = []
        copy = self._copies[plan.step % len(self._copies)]
        if sampler is not None and wanting:
            asked = sampler.asked(item.row.slot for item in wanting)
            rows = len(wanting)
            copy.token_ids[:rows].copy_(self._outputs.token_ids[:rows], non_blocking=True)
            copy.broken[:rows].copy_(self._outputs.broken[:rows], non_blocking=True)
            if any(count is not None for count in asked):
                copy.scores[:rows].copy_(self._outputs.scores[:rows], non_blocking=True)
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()

        def read() -> StepResult | None:
            self._comm.check()
            if sampler is None:
                return None
            sampled = sampler.read(copy, asked)
            some = any(count is not None for count in asked)
            return StepResult(
                plan.epoch,
                plan.step,
                [[token] for token in sampled.token_ids],
                [None if one is None else [one] for one in sampled.logprobs] if some else None,
                _read_scores(sampler, scores),
                time.monotonic() - began_s,
            )

        self._completions.put(Pending(event, read, answer))

    # Sampled tokens on their way from the last stage to the first.

    def _hand_back(self, count: int) -> None:
        if self._sampler is not None and not self._is_first:
            self._comm.tokens_to_first_stage(self._outputs.token_ids[:count].long())

    def _await_tokens(self, wanting: Sequence[Scheduled]) -> None:
        self._awaited.append([item.row.slot for item in wanting])
        while len(self._awaited) > self._most_awaited:
            self._take_tokens()

    def _await_known(self, scheduled: Sequence[Scheduled]) -> None:
        """Queue the arrival of every token that this step's rows feed on."""
        missing = {item.row.slot for item in scheduled if item.span.end > len(item.row.token_ids)}
        while any(missing.intersection(slots) for slots in self._awaited):
            self._take_tokens()

    def _take_tokens(self) -> None:
        slots = self._awaited.popleft()
        tokens = self._comm.tokens_from_last_stage(len(slots))
        where = torch.tensor(slots, pin_memory=True).to(self._device.torch_device, non_blocking=True)
        self._inputs.last_tokens.index_copy_(0, where, tokens)


def _feeds_on_sampled(item: Scheduled) -> bool:
    """Whether a row's one token is the one that was sampled last, so that the device has it already."""
    return item.wants_logits and item.span.start >= len(item.row.token_ids)


def _table_updates(plan: StepPlan, scheduled: Sequence[Scheduled]) -> list[tuple[int, int, int, int]]:
    """Return what a plan changes in the block tables: group, slot, index, block."""
    updates = [
        (group, new.slot, index, block)
        for new in plan.new_rows
        for group, ids in enumerate(new.block_ids)
        for index, block in enumerate(ids)
    ]
    for advance, item in zip(plan.advances, scheduled, strict=True):
        if advance.new_block_ids is None:
            continue
        for group, (ids, table) in enumerate(zip(advance.new_block_ids, item.span.tables, strict=True)):
            first = len(table.ids) - len(ids)
            updates += [(group, advance.slot, first + index, block) for index, block in enumerate(ids)]
    return updates


def _read_scores(sampler: CudaSampler, scores: Sequence[_Scores]) -> list[PromptLogprobs]:
    """Return each row's pieces as one, in order."""
    found: dict[int, PromptLogprobs] = {}
    for piece in scores:
        tokens = sampler.read_scores(piece.copy, piece.token_ids, piece.k)
        before = found.get(piece.slot)
        found[piece.slot] = PromptLogprobs(
            piece.slot,
            piece.start if before is None else before.start,
            tokens if before is None else before.tokens + tokens,
        )
    return list(found.values())
