"""FlashInfer's prefill over a float8 cache: the rows' pages are copied in bf16 before each layer's launch.

bf16 holds a code times its power of two exactly, so nothing is lost on the way. A copy reads a byte and
writes two for each element of the context, FlashInfer reads them again: for a chunk of thousands of tokens
a few hundredths of what the products take.
"""

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_own import Shape
from worker.backends.cuda.flashinfer import PagedPrefill, PrefillPlan
from worker.backends.cuda.launch import Kernels

_THREADS = 256


class ExpandedPrefill:
    """Owns room for the pages of ``tokens`` tokens in bf16."""

    def __init__(
        self, kernels: Kernels, prefill: PagedPrefill, shape: Shape, tokens: int, device: torch.device
    ) -> None:
        self._prefill, self._shape = prefill, shape
        self._expand = kernels.get("attention", "expand_pages", "PPPiiii")
        self._width = shape.kv_heads * (shape.key_dim + shape.value_dim)
        self._room = -(-tokens // shape.block_tokens)
        self._lines = torch.zeros(
            (self._room * shape.block_tokens, self._width), dtype=torch.bfloat16, device=device
        )
        # The copies stand in the order of the rows' pages.
        self._order = torch.arange(self._room, dtype=torch.int32, device=device)

    @property
    def device_bytes(self) -> int:
        """Device memory that was allocated for good."""
        return self._prefill.device_bytes + self._lines.nbytes + self._order.nbytes

    @property
    def is_fa3(self) -> bool:
        """Which of FlashInfer's kernels it is."""
        return self._prefill.is_fa3

    def pages(self, kv_lengths: list[int]) -> int:
        """Return the pages that rows have."""
        return sum(-(-length // self._shape.block_tokens) for length in kv_lengths)

    def fitting(self, kv_lengths: list[int]) -> int:
        """Return how many of the first rows there is room for."""
        count = len(kv_lengths)
        while count and self.pages(kv_lengths[:count]) > self._room:
            count -= 1
        return count

    def plan(self, q_starts: list[int], kv_lengths: list[int]) -> PrefillPlan:
        """See ``PagedPrefill.plan``; the rows fit."""
        return self._prefill.plan(q_starts, kv_lengths)

    def launch(
        self,
        plan: PrefillPlan,
        num_pages: int,
        pages: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [tokens, heads * dim]; ``pages``: block ids of the rows, one after another."""
        shape = self._shape
        pieces = -(-shape.block_tokens * (self._width // 8) // _THREADS)
        self._expand(
            (num_pages, pieces),
            _THREADS,
            (
                cache.lines,
                pages,
                self._lines,
                shape.kv_heads,
                shape.key_dim,
                shape.value_dim,
                shape.block_tokens,
            ),
        )
        expanded = LayerCache(cache.group, self._lines, cache.heads, cache.key_dim, cache.value_dim)
        self._prefill.launch(plan, self._order, queries, expanded, out)
