"""Plain torch on a CPU: the reference, and a fast one.

Measured in float32 (docs/performance.md): on AMD cores, where MKL does not use what they have, oneDNN's
products take half of MKL's time at every number of rows. On the others MKL reads weights at the memory's
speed up to 3 rows; from 4 to about 192 rows oneDNN takes 0.55 to 0.8 of the time of MKL, whose packing of
the weights then costs as much as the product.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch.nn import functional

from kv.tensors import LayerCache
from models.moe import Routing
from worker.backends import cpu_divided
from worker.backends.base import ExpertWeights, LatentHeads, Weight
from worker.backends.cpu_attention import PagedAttentionPlan, attend, plan_attention, store
from worker.backends.cpu_latent import CpuLatentAttention, rotate_pairs
from worker.backends.cpu_moe import CpuExperts
from worker.backends.cpu_packed import unpacked_tiles
from worker.comm import Communicator
from worker.context import AttentionPlan, RowSpan

GATHER_BYTES = 8 << 20
"""Scattered pages are copied together in pieces of at most this, inside the plan's workspace line."""

_ONEDNN_ROWS_ON_AMD = range(1, 1 << 30)
_ONEDNN_ROWS = range(4, 193)


class CpuBackend:
    """``Backend`` on host memory. Owns the scratch that scattered pages are gathered into."""

    def __init__(
        self,
        gather_bytes: int = GATHER_BYTES,
        converted_groups: frozenset[int] = frozenset(),
        chunks: Mapping[int, int] = MappingProxyType({}),
        division: cpu_divided.Division | None = None,
    ) -> None:
        """``converted_groups``: KV groups that are stored in another dtype than is computed in.

        ``chunks``: tokens of a chunk, of the groups that are chunked. ``division``: of the positions of all
        groups, where ranks keep them by turns.
        """
        self.device = torch.device("cpu")
        # Allocated once: fresh pages for each layer's gather would cost several times the copy.
        self._scratch = torch.empty(gather_bytes, dtype=torch.uint8)
        self._converted_groups, self._chunks, self._division = converted_groups, chunks, division
        self._onednn_rows = _onednn_rows()

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``Backend.linear``."""
        if not isinstance(weight, torch.Tensor):
            found = x.new_empty(x.shape[0], weight.shape[0])
            for rows, tile in unpacked_tiles(weight, x.dtype):
                found[:, rows] = self.linear(x, tile)
            return found
        if x.shape[0] in self._onednn_rows and x.dtype == torch.float32:
            product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(  # noqa: SLF001
                x.contiguous(), weight, None, "none", [], ""
            )
            return product
        return functional.linear(x, weight)

    def linear_update(
        self,
        residual: torch.Tensor,  # noqa: ARG002
        x: torch.Tensor,
        weight: Weight,
        comm: Communicator,  # noqa: ARG002
    ) -> torch.Tensor:
        """See ``Backend.linear_update``."""
        return self.linear(x, weight)

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``Backend.logits``."""
        return self.linear(x, weight).float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See ``Backend.rms_norm``."""
        return functional.rms_norm(x, weight.shape, weight, eps)

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """See ``Backend.norm_heads``."""
        heads = x.view(x.shape[0], -1, weight.shape[0])
        heads.copy_(functional.rms_norm(heads, weight.shape, weight, eps))

    def reduce_add(self, residual: torch.Tensor, update: torch.Tensor, comm: Communicator) -> None:
        """See ``Backend.reduce_add``."""
        comm.all_reduce(update)
        residual.add_(update)

    def reduce_add_norm(
        self,
        residual: torch.Tensor,
        update: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        comm: Communicator,
    ) -> torch.Tensor:
        """See ``Backend.reduce_add_norm``."""
        self.reduce_add(residual, update, comm)
        return self.rms_norm(residual, weight, eps)

    def swiglu_linear(self, x: torch.Tensor, gate_up: Weight) -> torch.Tensor:
        """See ``Backend.swiglu_linear``."""
        gate, up = self.linear(x, gate_up).chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def experts(self, weights: ExpertWeights, routing: Routing) -> CpuExperts:
        """See ``Backend.experts``."""
        return CpuExperts(weights, routing, self.linear, self.swiglu_linear)

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """See ``Backend.embed``."""
        local = token_ids - first
        elsewhere = (local < 0) | (local >= count)
        found = functional.embedding(local.masked_fill_(elsewhere, 0), weight)
        return found.masked_fill_(elsewhere.unsqueeze(-1), 0)

    def plan_attention(
        self, spans: list[RowSpan], group: int, block_tokens: int, width: int
    ) -> AttentionPlan:
        """Prepare attention in one KV group, once a step; ``width``: elements of a cache line."""
        is_converted = group in self._converted_groups
        division = self._division
        page_tokens = block_tokens if division is None else block_tokens // division.size
        # What is converted, and before it what it is converted from: at most two bytes an element.
        gather_blocks = self._scratch.numel() // (width * (6 if is_converted else 4) * page_tokens)
        assert gather_blocks >= 1, (width, page_tokens)
        if division is not None:
            assert group not in self._chunks, "no window over divided positions"
            return cpu_divided.DividedPlan(
                spans, group, block_tokens, division, gather_blocks, is_converted=is_converted
            )
        return plan_attention(
            spans,
            group,
            block_tokens,
            gather_blocks,
            is_converted=is_converted,
            chunk=self._chunks.get(group),
        )

    def rope_and_store(
        self, qkv: torch.Tensor, rotation: torch.Tensor, cache: LayerCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """See ``Backend.rope_and_store``."""
        queries_keys = qkv[:, : qkv.shape[1] - cache.heads * cache.value_dim]
        # The two halves of a head rotate against each other: [tokens, heads, 2, key_dim / 2].
        halves = queries_keys.view(qkv.shape[0], -1, 2, cache.key_dim // 2)
        crossed = halves.flip(2)
        halves.mul_(rotation[:, None, :1]).addcmul_(crossed, rotation[:, None, 1:])
        return self.store(qkv, cache, plan)

    def rotate_neighbours(self, x: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``Backend.rotate_neighbours``."""
        rotate_pairs(x.view(x.shape[0], -1, 2 * rotation.shape[2]), rotation)

    def store(self, qkv: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """See ``Backend.store``."""
        lines = qkv[:, -cache.heads * (cache.key_dim + cache.value_dim) :]
        if isinstance(plan, cpu_divided.DividedPlan):
            cpu_divided.store(lines, cache, plan)
        else:
            assert isinstance(plan, PagedAttentionPlan)
            store(lines, cache, plan)
        return qkv

    def attend(self, rotated: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """See ``Backend.attend``."""
        if isinstance(plan, cpu_divided.DividedPlan):
            return cpu_divided.attend(rotated, cache, plan, self._scratch)
        assert isinstance(plan, PagedAttentionPlan)
        return attend(rotated, cache, plan, self._scratch)

    def latent_attention(self, heads: LatentHeads, cache: LayerCache) -> CpuLatentAttention:
        """See ``Backend.latent_attention``."""
        return CpuLatentAttention(heads, cache, self.linear, self._scratch)


def _onednn_rows() -> range:
    """Return the numbers of rows that oneDNN multiplies faster than MKL here.

    Fixed by the machine, so that a restart computes the same bits.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return range(0)
    facts = Path("/proc/cpuinfo")
    is_amd = facts.exists() and "AuthenticAMD" in facts.read_text()
    return _ONEDNN_ROWS_ON_AMD if is_amd else _ONEDNN_ROWS
