"""Prefill of long rows whose blocks are neighbours: FlashInfer's FA3 over the cache as a matrix.

A run of blocks is a matrix of lines, which tensor maps read: the copy engine brings tiles of 128 keys,
where pages are gathered by threads, in tiles of 96. Each row has a launch of its own, whose matrix ends
with the row: beyond its last key the copy engine gives zeros, whatever lies in the cache there.
"""

from dataclasses import dataclass
from typing import Any

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_own import Shape
from worker.backends.cuda.flashinfer import Operators, RaggedPlan, RaggedPrefill, prefill_name, takes_pages
from worker.backends.cuda.long_rows import LONG_ROW


@dataclass(frozen=True, slots=True)
class RunPlan:
    """One row of a step; good until the step after the next begins."""

    ragged: RaggedPlan
    first_line: int
    length: int


class RunPrefill:
    """Owns its plans' memory, for as many rows as a step can have."""

    def __init__(self, module: Any, shape: Shape, device: torch.device) -> None:
        """Launches once: an operator takes memory for its code then, and a step must not."""
        self._shape = shape
        self._ragged = RaggedPrefill(
            module,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            key_dim=shape.key_dim,
            value_dim=shape.value_dim,
            scale=shape.key_dim**-0.5,
            max_rows=1,
            step_tokens=shape.step_tokens,
            device=device,
            plans=shape.step_tokens // LONG_ROW,
        )
        width = shape.kv_heads * (shape.key_dim + shape.value_dim)
        lines = torch.zeros(2, width, dtype=shape.dtype, device=device)
        cache = LayerCache(0, lines, shape.kv_heads, shape.key_dim, shape.value_dim)
        queries = torch.zeros(2, shape.heads * shape.key_dim, dtype=shape.dtype, device=device)
        self.begin()
        self.launch(self.plan(2, 2, 0), queries, cache, torch.empty_like(queries))

    @staticmethod
    def find(operators: Operators, shape: Shape) -> Any | None:
        """Return the operator for a shape, if it is there and takes it."""
        # A tensor map's strides are multiples of 16 bytes; a single head's comes as one element.
        if not takes_pages(shape) or 1 in (shape.heads, shape.kv_heads) or shape.step_tokens < LONG_ROW:
            return None
        return operators.load(prefill_name(shape.key_dim, is_fa3=True))

    @property
    def device_bytes(self) -> int:
        """Device memory that was allocated for good."""
        return self._ragged.device_bytes

    def begin(self) -> None:
        """Begin a step: the plans of the step before the last may be written over."""
        self._ragged.begin()

    def plan(self, count: int, length: int, first_block: int) -> RunPlan:
        """Plan a row's last ``count`` tokens of ``length`` in the cache, whose first block is given."""
        ragged = self._ragged.plan([0, count], [0, length], [], is_causal=True)
        return RunPlan(ragged, first_block * self._shape.block_tokens, length)

    def launch(self, plan: RunPlan, queries: torch.Tensor, cache: LayerCache, out: torch.Tensor) -> None:
        """Attend ``queries`` [count, heads * dim], all of one row, into ``out``."""
        shape = self._shape
        own = cache.lines[plan.first_line : plan.first_line + plan.length]
        keys, values = own.tensor_split([shape.kv_heads * shape.key_dim], dim=1)
        self._ragged.launch(
            plan.ragged,
            queries.view(-1, shape.heads, shape.key_dim),
            keys.view(-1, shape.kv_heads, shape.key_dim),
            values.view(-1, shape.kv_heads, shape.value_dim),
            out.view(-1, shape.heads, shape.value_dim),
        )
