"""Multi-head latent attention over the paged cache: planned once a step and KV group, run once a layer.

Rows of few query tokens take the absorbed form, as one-token rows each; rows of many the expanded one where
FlashInfer's operator was built. See ``worker/backends/cpu_latent.py`` for what the forms are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import torch

from kv.tensors import LayerCache
from worker.backends.base import LatentHeads
from worker.backends.cuda.attention_paths import DecodeRule
from worker.backends.cuda.backend import CudaStepPlan, latents_refused
from worker.backends.cuda.flashinfer import Operators
from worker.backends.cuda.latent_own import AbsorbedAttention, LatentRows, LatentShape, LatentStore
from worker.backends.cuda.latent_prefill import LatentPrefill
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.pieces import Pieces
from worker.context import AttentionPlan

MOST_ABSORBED = 16
"""Query tokens of a row up to which its context is not expanded: each of them reads the lines again, from
L2 at best, and the expansion costs about what 30 readings do."""

_Launch = Callable[[torch.Tensor, torch.Tensor, LatentHeads, LayerCache, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens [first, first + count) of a step, attended in one form."""

    first: int
    count: int
    launch: _Launch


@dataclass(frozen=True, slots=True)
class LatentPlan(AttentionPlan):
    """Attention of one step in one KV group."""

    tokens: int
    parts: tuple[_Part, ...]


class CudaLatents:
    """Attention of one KV group of latents. Owns its workspace: steps run in order on one stream."""

    def __init__(
        self, kernels: Kernels, operators: Path | None, shape: LatentShape, device: torch.device
    ) -> None:
        """Choose kernels and allocate their workspace; ``operators``: the directory of FlashInfer's.

        Errors: ``UnsupportedModelError`` for lines that no kernel takes; ``CudaError``.
        """
        if not shape.is_served:
            raise latents_refused(shape.line_dim)
        # A float8 page's lines begin at multiples of 16 bytes.
        assert not shape.is_float8 or not shape.is_for_tensor_cores or shape.block_tokens % 16 == 0, shape
        self._shape = shape
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._store = LatentStore(kernels, shape)
        self._absorbed = AbsorbedAttention(kernels, shape, multiprocessors)
        self._scratch = torch.zeros(self._absorbed.scratch_bytes + 16, dtype=torch.uint8, device=device)
        self._prefill: LatentPrefill | None = None
        module = LatentPrefill.find(Operators(operators), shape)
        if module is not None:
            self._prefill = LatentPrefill(kernels, module, shape, device)
        self._rule = DecodeRule("latent")

    @property
    def workspace_bytes(self) -> int:
        """Device memory that was allocated for good."""
        return self._scratch.nbytes + (0 if self._prefill is None else self._prefill.device_bytes)

    @property
    def is_expanding(self) -> bool:
        """Whether rows of many tokens are expanded."""
        return self._prefill is not None

    def layer(self, heads: LatentHeads, cache: LayerCache) -> "CudaLatentAttention":
        """Return the attention of one layer."""
        return CudaLatentAttention(self, self._store, heads, cache)

    def decode_rule(self, rows: int, mean_context: float) -> DecodeRule:  # noqa: ARG002
        """See ``CudaAttention.decode_rule``: one kernel serves all."""
        return self._rule

    def decode_rules(self, rows: int) -> tuple[DecodeRule, ...]:  # noqa: ARG002
        """See ``CudaAttention.decode_rules``."""
        return (self._rule,)

    def plan_decode(
        self,
        rows: int,
        slots: torch.Tensor,
        kv_lengths: torch.Tensor,
        block_tables: torch.Tensor,
        rule: DecodeRule | None = None,  # noqa: ARG002
        *,
        is_beside_mixed: bool = False,  # noqa: ARG002
    ) -> LatentPlan:
        """See ``CudaAttention.plan_decode``. Capturable."""
        served = LatentRows(rows, slots[:rows], kv_lengths[:rows], None, block_tables)
        return LatentPlan(rows, (_Part(0, rows, partial(self._attend_absorbed, served)),))

    def plan_mixed(
        self,
        q_starts: list[int],
        kv_lengths: list[int],
        slots_device: torch.Tensor,
        q_starts_device: torch.Tensor,
        kv_lengths_device: torch.Tensor,
        block_tables: torch.Tensor,
        first_blocks: Sequence[int | None] = (),  # noqa: ARG002
    ) -> LatentPlan:
        """See ``CudaAttention.plan_mixed``: any number of tokens, at least one each; not capturable."""
        counts = [after - before for before, after in pairwise(q_starts)]
        assert len(counts) == len(kv_lengths), (q_starts, kv_lengths)
        assert min(counts) >= 1, counts
        if self._prefill is not None:
            self._prefill.begin()
        most = MOST_ABSORBED if self._prefill is not None else max(counts)
        parts = []
        for is_few, run in groupby(range(len(counts)), key=lambda row: counts[row] <= most):
            rows = list(run)
            begin, end = rows[0], rows[-1] + 1
            first, tokens = q_starts[begin], q_starts[end] - q_starts[begin]
            slots = slots_device[begin:end]
            launch: _Launch
            if is_few:
                starts = None if tokens == len(rows) else q_starts_device[begin : end + 1]
                served = LatentRows(tokens, slots, kv_lengths_device[begin:end], starts, block_tables)
                launch = partial(self._attend_absorbed, served)
            else:
                assert self._prefill is not None
                here = [start - first for start in q_starts[begin : end + 1]]
                plan = self._prefill.plan(here, kv_lengths[begin:end], slots, block_tables)
                launch = partial(self._prefill.launch, plan)
            parts.append(_Part(first, tokens, launch))
        return LatentPlan(q_starts[-1], tuple(parts))

    def run(
        self,
        queries: torch.Tensor,
        lines: torch.Tensor,
        heads: LatentHeads,
        cache: LayerCache,
        plan: AttentionPlan,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [tokens, heads, query_dim] into ``out`` [tokens, heads * value_dim]."""
        assert isinstance(plan, LatentPlan)
        assert queries.shape[0] == plan.tokens, (queries.shape, plan.tokens)
        for part in plan.parts:
            tokens = slice(part.first, part.first + part.count)
            part.launch(queries[tokens], lines[tokens], heads, cache, out[tokens])

    def attend_latents(
        self,
        rows: LatentRows,
        queries: torch.Tensor,
        heads: LatentHeads,
        cache: LayerCache,
        log_sums: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return Σ softmax · latent [tokens, heads, latent]; see ``AbsorbedAttention.launch``."""
        shape, tokens = self._shape, queries.shape[0]
        absorbed = torch.empty(tokens, shape.heads, shape.latent, dtype=shape.dtype, device=queries.device)
        nope = queries[..., : shape.nope_dim].transpose(0, 1)
        torch.bmm(nope, heads.keys, out=absorbed.transpose(0, 1))
        found = torch.empty_like(absorbed)
        self.attend_lines(rows, absorbed, queries, cache, found, log_sums)
        return found

    def attend_lines(
        self,
        rows: LatentRows,
        absorbed: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
        log_sums: torch.Tensor | None = None,
    ) -> None:
        """See ``AbsorbedAttention.launch``."""
        self._absorbed.launch(rows, self._scratch, absorbed, queries, cache, out, log_sums)

    def _attend_absorbed(
        self,
        rows: LatentRows,
        queries: torch.Tensor,
        lines: torch.Tensor,  # noqa: ARG002
        heads: LatentHeads,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        found = self.attend_latents(rows, queries, heads, cache).transpose(0, 1)
        by_head = out.view(out.shape[0], self._shape.heads, self._shape.value_dim).transpose(0, 1)
        torch.bmm(found, heads.values.transpose(1, 2), out=by_head)


class CudaLatentAttention:
    """``LatentAttention`` of one layer."""

    def __init__(
        self, group: CudaLatents, store: LatentStore, heads: LatentHeads, cache: LayerCache
    ) -> None:
        self._group, self._store, self._heads, self._cache = group, store, heads, cache

    def rope_and_store(
        self, queries: torch.Tensor, lines: torch.Tensor, rotation: torch.Tensor, plan: AttentionPlan
    ) -> None:
        """See ``LatentAttention.rope_and_store``."""
        assert isinstance(plan, CudaStepPlan)
        self._store(queries, lines, rotation, self._cache, plan.lines)

    def attend(self, queries: torch.Tensor, lines: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """See ``LatentAttention.attend``."""
        assert isinstance(plan, CudaStepPlan)
        width = queries.shape[1] * self._heads.value_dim
        if isinstance(plan.attention, Pieces):
            return plan.attention.attend(self._run, self._cache.group, (queries, lines), width)
        out = torch.empty(queries.shape[0], width, dtype=queries.dtype, device=queries.device)
        self._run(plan.attention, (queries, lines), out)
        return out

    def _run(self, plan: AttentionPlan, asked: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
        queries, lines = asked
        self._group.run(queries, lines, self._heads, self._cache, plan, out)
