"""Which kernel attends for which shape, in order of preference: the first that is there and fits is used.

Set from ``benchmarks/gpu_attention.py``. FlashInfer's paths are there only where their operator was built.
"""

from dataclasses import dataclass
from typing import Literal

DecodePath = Literal["xqa", "xqa_wide", "tensor", "vector"]
"""FlashInfer's XQA with one or two blocks a multiprocessor; our kernels on tensor and on CUDA cores."""
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


DECODE_PATHS = (
    DecodeRule("xqa"),
    DecodeRule("tensor", max_rows=16),
    DecodeRule("tensor", min_rows=17, split_tokens=512),
    DecodeRule("vector"),
)
PREFILL_PATHS: tuple[PrefillPath, ...] = ("fa3", "fa2", "tiled")
