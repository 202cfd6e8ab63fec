"""Latent attention in its expanded form: keys and values of each head, then FlashInfer's FlashAttention 3.

A row's new tokens attend to each other by one launch, of all rows; to what is cached by one for each piece
of ``step_tokens`` cached tokens, whose lines are expanded for it. Parts are merged by their log-sum-exp.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from kv.tensors import LayerCache
from worker.backends.base import LatentHeads
from worker.backends.cuda.flashinfer import Operators, RaggedPlan, RaggedPrefill, prefill_name
from worker.backends.cuda.latent_own import LatentShape
from worker.backends.cuda.latent_pieces import cached_pieces
from worker.backends.cuda.launch import Kernels

_DIMS = (192, 128)
_THREADS = 128


@dataclass(frozen=True, slots=True)
class _Piece:
    """Cached tokens of neighbouring rows, whose queries are tokens [first, last)."""

    first: int
    last: int
    tokens: int
    plan: RaggedPlan
    slots: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExpandedPlan:
    """One step's rows; good until the plan after the next."""

    new: RaggedPlan
    pieces: tuple[_Piece, ...]
    block_tables: torch.Tensor


class LatentPrefill:
    """Rows of many query tokens."""

    def __init__(self, kernels: Kernels, module: object, shape: LatentShape, device: torch.device) -> None:
        self._shape = shape
        self._ragged = RaggedPrefill(
            module,
            heads=shape.heads,
            key_dim=shape.query_dim,
            value_dim=shape.value_dim,
            scale=shape.scale,
            max_rows=shape.max_rows,
            step_tokens=shape.step_tokens,
            device=device,
        )
        self._gather = kernels.get("latent", f"gather_lines_{shape.suffix}", "PPPPPiiiPPPiiii")
        self._merge = kernels.get("latent", "merge_means_bf16", "PPPPii")

    @staticmethod
    def find(operators: Operators, shape: LatentShape) -> object | None:
        """Return the operator for a shape, if it is there and takes it."""
        # It reads the queries through a tensor map, whose strides a single head would break.
        if shape.dtype != torch.bfloat16 or shape.heads == 1:
            return None
        if (shape.query_dim, shape.value_dim) != _DIMS or shape.rope % 2 or shape.latent % 2:
            return None
        found: object | None = operators.load(prefill_name(shape.query_dim, True, shape.value_dim))
        return found

    @property
    def device_bytes(self) -> int:
        """Device memory that was allocated for good."""
        return self._ragged.device_bytes

    def begin(self) -> None:
        """Begin a step: the plans of the step before the last may be written over."""
        self._ragged.begin()

    def plan(
        self, q_starts: list[int], kv_lengths: list[int], slots: torch.Tensor, block_tables: torch.Tensor
    ) -> ExpandedPlan:
        """Plan rows whose queries begin at ``q_starts`` [rows + 1], from 0; ``slots``: int32 [rows]."""
        new = self._ragged.plan(q_starts, q_starts, [], is_causal=True)
        counts = [after - before for before, after in pairwise(q_starts)]
        cached = [length - count for length, count in zip(kv_lengths, counts, strict=True)]
        pieces = []
        for piece in cached_pieces(cached, self._shape.step_tokens):
            last_row = piece.first_row + piece.rows
            starts = q_starts[piece.first_row : last_row + 1]
            planned = self._ragged.plan(
                [start - starts[0] for start in starts], piece.starts, piece.firsts, is_causal=False
            )
            pieces.append(
                _Piece(starts[0], starts[-1], piece.starts[-1], planned, slots[piece.first_row : last_row])
            )
        return ExpandedPlan(new, tuple(pieces), block_tables)

    def launch(
        self,
        plan: ExpandedPlan,
        queries: torch.Tensor,
        lines: torch.Tensor,
        heads: LatentHeads,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [tokens, heads, query_dim], whose own lines are ``lines``, into ``out``."""
        shape, tokens = self._shape, queries.shape[0]
        # Always as much as the largest step has: the warm-up's takes what every other one needs.
        room, device = shape.step_tokens, queries.device
        latents = torch.empty(room, shape.latent, dtype=shape.dtype, device=device)
        keys = torch.empty(room, shape.heads, shape.query_dim, dtype=shape.dtype, device=device)
        values = torch.empty(room, shape.heads, shape.value_dim, dtype=shape.dtype, device=device)
        others = torch.empty(room, shape.heads, shape.value_dim, dtype=shape.dtype, device=device)
        sums, other_sums = torch.empty(2, room, shape.heads, dtype=torch.float32, device=device)
        out = out.view(tokens, shape.heads, shape.value_dim)

        keys[:tokens, :, shape.nope_dim :] = lines[:, None, shape.latent :]
        _expand(lines[:, : shape.latent], heads, keys[:tokens], values[:tokens])
        self._ragged.launch(plan.new, queries, keys[:tokens], values[:tokens], out, sums[:tokens])
        for piece in plan.pieces:
            count = piece.tokens
            self._gather_lines(plan, piece, cache, latents, keys)
            _expand(latents[:count], heads, keys[:count], values[:count])
            asked, found = queries[piece.first : piece.last], out[piece.first : piece.last]
            mine, other = others[: asked.shape[0]], other_sums[: asked.shape[0]]
            self._ragged.launch(piece.plan, asked, keys[:count], values[:count], mine, other)
            self._merge(
                (shape.heads, asked.shape[0]),
                _THREADS,
                (found, sums[piece.first : piece.last], mine, other, shape.heads, shape.value_dim),
            )

    def _gather_lines(
        self,
        plan: ExpandedPlan,
        piece: _Piece,
        cache: LayerCache,
        latents: torch.Tensor,
        keys: torch.Tensor,
    ) -> None:
        shape = self._shape
        self._gather(
            (piece.tokens,),
            _THREADS,
            (
                cache.lines,
                plan.block_tables,
                piece.slots,
                0,
                piece.plan.kv_starts,
                piece.slots.shape[0],
                shape.max_blocks,
                shape.block_tokens,
                piece.plan.firsts,
                latents,
                keys,
                shape.heads,
                shape.query_dim,
                shape.latent,
                shape.rope,
            ),
        )


def _expand(latents: torch.Tensor, heads: LatentHeads, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write keys but for their rotated part, and values, of latents [tokens, latent], by head."""
    nope = heads.nope_dim
    shared = latents[None].expand(keys.shape[1], -1, -1)
    torch.bmm(shared, heads.keys.transpose(1, 2), out=keys[..., :nope].transpose(0, 1))
    torch.bmm(shared, heads.values.transpose(1, 2), out=values.transpose(0, 1))
