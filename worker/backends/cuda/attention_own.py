"""Our attention kernels: float32, and every bf16 shape that FlashInfer's operators lack."""

import math
from dataclasses import dataclass

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_paths import DecodePath
from worker.backends.cuda.launch import Kernels

_MOST_SPLITS = 128  # as in attention.cu
_LEAST_SPLIT_TOKENS = 64
_TILE = 32
_THREADS = 128
_TENSOR_BLOCKS = {64: 4, 128: 3, 256: 2}
_VECTOR_BLOCKS = 3
_FLOAT8_VECTOR_BLOCKS = 2
_RING_DIM = 128
_RING_TILE_TOKENS = 16
_RING_TILE_ELEMENTS = 2 * _RING_TILE_TOKENS * _RING_DIM
_RINGS: dict[DecodePath, tuple[int, int, int, int]] = {
    "ring_2x3": (2, 3, 4, 1),
    "ring_4x2": (4, 2, 3, 1),
    "ring_8x2": (8, 2, 1, 1),
    "ring_8x2_by_2": (8, 2, 1, 2),
    "ring_2x6_e4m3": (2, 6, 4, 1),
    "ring_4x4_e4m3": (4, 4, 3, 1),
    "ring_8x4_e4m3": (8, 4, 1, 1),
    "ring_8x4_by_2_e4m3": (8, 4, 1, 2),
}
"""Warps of a block, tiles of a warp, blocks that a multiprocessor has memory for, blocks of a cluster."""
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one KV group on one rank, and the largest step it is asked for."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    block_tokens: int
    max_rows: int
    max_blocks: int
    step_tokens: int
    is_float8: bool = False
    """Whether the cache is in e4m3 with scales; queries and outputs are in ``dtype`` all the same."""

    @property
    def ratio(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def kernel_suffix(self) -> str:
        """What the names of our kernels end with, after the form: the dtypes."""
        return _DTYPE_NAMES[self.dtype] + ("_e4m3" if self.is_float8 else "")

    @property
    def max_context(self) -> int:
        """Tokens that a row's line of the block tables can hold."""
        return self.max_blocks * self.block_tokens


@dataclass(frozen=True, slots=True)
class Rows:
    """What the kernels read of some rows, on the device."""

    count: int
    slots: torch.Tensor
    """[count], int32: the row's line in ``block_tables``."""
    kv_lengths: torch.Tensor
    """[count], int32, tokens of this step included."""
    block_tables: torch.Tensor
    """[slots, max_blocks], int32."""


def split(pairs: int, context: int, blocks_at_once: int, tokens: int) -> int:
    """Return into how many blocks of at least so many tokens a row's context is cut at most.

    ``pairs``: blocks that there are without cutting. Few pairs are cut until they fill the device once;
    many until their last wave is not mostly empty.
    """
    if pairs * 2 <= blocks_at_once:
        count = blocks_at_once // pairs
    else:
        waves = {n: pairs * n / blocks_at_once for n in range(1, 5)}
        filled = {n: w / math.ceil(w) for n, w in waves.items()}
        count = next(
            (n for n, share in filled.items() if share >= 0.8), max(filled, key=filled.__getitem__)
        )
    return max(1, min(count, _MOST_SPLITS, -(-context // tokens)))


def _ring_tile_bytes(shape: Shape) -> int:
    if shape.is_float8:
        # A byte an element, and one for each token's key and value.
        return _RING_TILE_ELEMENTS + 2 * _RING_TILE_TOKENS
    return 2 * _RING_TILE_ELEMENTS


class OwnDecode:
    """One query token a row. Capturable: how a row is split is decided on the device."""

    def __init__(
        self,
        kernels: Kernels,
        shape: Shape,
        multiprocessors: int,
        rows: range,
        split_tokens: int,
        path: DecodePath,
    ) -> None:
        """``rows``: the numbers of rows that it will be asked for. The path fits the shape."""
        # The first worker of every block must find a token.
        assert split_tokens >= _LEAST_SPLIT_TOKENS, split_tokens
        assert self.fits(shape, path), (shape, path)
        self._shape = shape
        self._split_tokens = split_tokens
        largest = max(shape.key_dim, shape.value_dim)
        self._arguments: tuple[float, ...] = (_LOG2_E / math.sqrt(shape.key_dim),)
        self._threads, self._shared_bytes, self._cluster = _THREADS, 0, 1
        if path in _RINGS:
            warps, stages, blocks, self._cluster = _RINGS[path]
            assert split_tokens & (split_tokens - 1) == 0, split_tokens
            self._kernel = kernels.get("attention", f"decode_{path}", "PPPPPiiPPPPiiiiif")
            self._heads, self._threads = 8, 32 * warps
            self._shared_bytes = warps * stages * _ring_tile_bytes(shape)
        elif path == "tensor":
            dims = next(d for d in _TENSOR_BLOCKS if d >= largest)
            self._kernel = kernels.get("attention", f"decode_tensor_{dims}", "PPPPPiiPPPPiiiiif")
            self._heads, blocks = 8, _TENSOR_BLOCKS[dims]
        else:
            name = f"decode_vector_{shape.kernel_suffix}"
            self._kernel = kernels.get("attention", name, "PPPPPiiPPPPiiiiifi")
            self._heads, blocks = 4, _FLOAT8_VECTOR_BLOCKS if shape.is_float8 else _VECTOR_BLOCKS
            self._arguments += (1 << (largest // 8 - 1).bit_length(),)
        self._blocks_at_once = blocks * multiprocessors
        self._pairs_per_row = shape.kv_heads * -(-shape.ratio // self._heads)
        self.counters = shape.max_rows * self._pairs_per_row
        """int32 zeros needed; they are zero again after each launch."""
        self.scratch_bytes = max(map(self._scratch_bytes, rows))

    @staticmethod
    def fits(shape: Shape, path: DecodePath) -> bool:
        """Whether the path is one of our kernels and takes the shape."""
        if path == "vector":
            return True
        if path in _RINGS:
            is_power_of_two = shape.block_tokens & (shape.block_tokens - 1) == 0
            if not is_power_of_two or not shape.key_dim == shape.value_dim == _RING_DIM:
                return False
            if path.endswith("_e4m3") != shape.is_float8:
                return False
        elif path != "tensor" or shape.is_float8:
            return False
        return shape.dtype == torch.bfloat16 and shape.block_tokens % 16 == 0

    def launch(
        self,
        rows: Rows,
        scratch: torch.Tensor,
        counters: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
        log_sums: torch.Tensor | None = None,
    ) -> None:
        """Attend ``queries`` [rows, heads * key_dim].

        ``log_sums``, float32 [rows, heads], gets the base-2 logarithm of each softmax's denominator, -inf
        for a row without tokens, whose output is zeros: with these, attentions to parts are merged.
        """
        shape = self._shape
        self._kernel(
            (self._splits(rows.count) * self._cluster, self._pairs_per_row, rows.count),
            self._threads,
            (
                queries,
                cache.lines,
                rows.block_tables,
                rows.slots,
                rows.kv_lengths,
                shape.max_blocks,
                shape.block_tokens,
                out,
                0 if log_sums is None else log_sums,
                scratch,
                counters,
                shape.heads,
                shape.kv_heads,
                shape.key_dim,
                shape.value_dim,
                self._split_tokens,
                *self._arguments,
            ),
            self._shared_bytes,
        )

    def _splits(self, rows: int) -> int:
        if self._cluster > 1:
            return 1
        pairs = rows * self._pairs_per_row
        return split(pairs, self._shape.max_context, self._blocks_at_once, self._split_tokens)

    def _scratch_bytes(self, rows: int) -> int:
        splits = self._splits(rows)
        pairs = rows * self._pairs_per_row
        return 0 if splits == 1 else pairs * splits * self._heads * (self._shape.value_dim + 2) * 4


class OwnPrefill:
    """Rows of any number of query tokens: float32 products on the CUDA cores."""

    def __init__(self, kernels: Kernels, shape: Shape) -> None:
        self._shape = shape
        dims = next(d for d in _TENSOR_BLOCKS if d >= shape.value_dim)
        name = f"prefill_{shape.kernel_suffix}_{dims}"
        self._kernel = kernels.get("attention", name, "PPPPPiiPPiiiiif")
        self._scale = _LOG2_E / math.sqrt(shape.key_dim)
        self._shared_bytes = _TILE * (2 * (shape.key_dim + 4) + shape.value_dim + 4) * 4

    def launch(
        self,
        rows: Rows,
        tiles: int,
        q_starts: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
    ) -> None:
        """Attend ``queries`` [tokens, heads * key_dim]; ``q_starts`` [rows + 1] may begin above 0."""
        shape = self._shape
        self._kernel(
            (tiles, shape.heads),
            _THREADS,
            (
                queries,
                cache.lines,
                rows.block_tables,
                rows.slots,
                rows.kv_lengths,
                shape.max_blocks,
                shape.block_tokens,
                q_starts,
                out,
                shape.heads,
                shape.kv_heads,
                shape.key_dim,
                shape.value_dim,
                rows.count,
                self._scale,
            ),
            self._shared_bytes,
        )

    @staticmethod
    def tiles(counts: list[int]) -> int:
        """Return the blocks a head needs for rows of so many query tokens."""
        return sum(-(-count // _TILE) for count in counts)
