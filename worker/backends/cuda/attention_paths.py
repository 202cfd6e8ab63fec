"""Which kernel attends for which shape, in order of preference: the first that is there and fits is used.

Set from ``benchmarks/gpu_attention.py``. FlashInfer's paths are there only where their operator was built.
"""

import math
from dataclasses import dataclass
from typing import Literal

RingPath = Literal[
    "ring_2x3",
    "ring_4x2",
    "ring_8x2",
    "ring_8x2_by_2",
    "ring_2x6_e4m3",
    "ring_4x4_e4m3",
    "ring_8x4_e4m3",
    "ring_8x4_by_2_e4m3",
]
"""Our kernel for bf16 dims of 128: warps of a block x tiles of 16 tokens that each has in shared memory.

``e4m3``: of a float8 cache, whose tiles are half as large, so that there are twice as many.
``by``: so many blocks, a cluster, share a row whatever its length and ``split_tokens``.
"""
DecodePath = RingPath | Literal["xqa", "xqa_wide", "tensor", "vector", "latent"]
"""FlashInfer's XQA with one or two blocks a multiprocessor; our kernels on tensor and on CUDA cores; the
one for latents, whose shape decides alone."""
PrefillPath = Literal["fa3", "fa2", "tiled"]
"""FlashInfer's FlashAttention 3 and 2; our own kernel."""


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """A path, and the steps it is preferred for."""

    path: DecodePath
    min_rows: int = 1
    max_rows: int = 1 << 30
    split_tokens: int = 128
    """Our own kernels cut a row into blocks of at least so many tokens."""
    below_context: float = math.inf
    """Only where rows have fewer tokens than this in the mean."""

    def serves(self, rows: int, mean_context: float) -> bool:
        """Return whether it is preferred for such a step."""
        return self.min_rows <= rows <= self.max_rows and mean_context < self.below_context


DECODE_PATHS = (
    # Two blocks a row leave a GPU idle where rows are few and long.
    DecodeRule("ring_8x2_by_2", max_rows=6, below_context=1024),
    DecodeRule("ring_8x2", max_rows=6),
    DecodeRule("ring_8x2_by_2", min_rows=7, max_rows=16),
    DecodeRule("ring_2x3", min_rows=17, max_rows=127, split_tokens=256),
    DecodeRule("ring_4x2", min_rows=128, split_tokens=256),
    # As many bytes under way as in bf16.
    DecodeRule("ring_8x4_by_2_e4m3", max_rows=6, below_context=1024),
    DecodeRule("ring_8x4_e4m3", max_rows=6),
    DecodeRule("ring_8x4_by_2_e4m3", min_rows=7, max_rows=16),
    DecodeRule("ring_2x6_e4m3", min_rows=17, max_rows=127, split_tokens=256),
    DecodeRule("ring_4x4_e4m3", min_rows=128, split_tokens=256),
    DecodeRule("xqa"),
    DecodeRule("tensor", max_rows=16),
    DecodeRule("tensor", min_rows=17, split_tokens=512),
    DecodeRule("vector"),
)
PREFILL_PATHS: tuple[PrefillPath, ...] = ("fa3", "fa2", "tiled")
