"""Our kernels for latent attention: the absorbed form, and rope with the KV write (latent.cu)."""

import math
from dataclasses import dataclass

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.attention_own import split
from worker.backends.cuda.launch import Kernel, Kernels

_FILE = "latent"
_ROWS = "PPPPiii"
_THREADS = 128
_MERGE_DIMS = 128
_WARPS = 4
_TENSOR_DIMS = (512, 64)
_TILE = 64
_STAGES = {False: 2, True: 4}
_HEAD_TILES = (8, 16, 32)
_LARGEST_VECTOR_LINE = 640  # as in latent.cu
_VECTOR_BLOCKS = 6
_VECTOR_SPLIT_TOKENS = 128
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Attention over the latents of one KV group on one rank, and the largest step it is asked for."""

    heads: int
    latent: int
    rope: int
    nope_dim: int
    value_dim: int
    scale: float
    """What scores are multiplied with."""
    dtype: torch.dtype
    block_tokens: int
    max_rows: int
    max_blocks: int
    step_tokens: int
    is_float8: bool = False
    """Whether the cache is in e4m3 with scales."""

    @property
    def line_dim(self) -> int:
        """Elements of a token's line."""
        return self.latent + self.rope

    @property
    def query_dim(self) -> int:
        """Elements of a head's query."""
        return self.nope_dim + self.rope

    @property
    def suffix(self) -> str:
        """What the names of our kernels end with: the dtypes."""
        return _DTYPE_NAMES[self.dtype] + ("_e4m3" if self.is_float8 else "")

    @property
    def is_for_tensor_cores(self) -> bool:
        """Whether the tensor cores' kernel takes it."""
        size = self.block_tokens
        return (
            self.dtype == torch.bfloat16
            and (self.latent, self.rope) == _TENSOR_DIMS
            and size % 16 == 0
            and size & (size - 1) == 0
        )

    @property
    def is_served(self) -> bool:
        """Whether any kernel takes it."""
        return self.is_for_tensor_cores or self.line_dim <= _LARGEST_VECTOR_LINE


@dataclass(frozen=True, slots=True)
class LatentRows:
    """What the kernels read of some rows, on the device."""

    tokens: int
    """Query tokens of all rows."""
    slots: torch.Tensor
    """[rows], int32: the row's line in ``block_tables``."""
    kv_lengths: torch.Tensor
    """[rows], int32, tokens of this step included."""
    starts: torch.Tensor | None
    """[rows + 1], int32: each row's first query token, from any number on; None: a row has one token."""
    block_tables: torch.Tensor
    """[slots, max_blocks], int32."""

    def arguments(self, shape: LatentShape) -> tuple[torch.Tensor | int, ...]:
        """Return them as the kernels take them."""
        return (
            self.block_tables,
            self.slots,
            self.kv_lengths,
            0 if self.starts is None else self.starts,
            0 if self.starts is None else self.starts.shape[0] - 1,
            shape.max_blocks,
            shape.block_tokens,
        )


class AbsorbedAttention:
    """All heads of query tokens over the lines themselves. Capturable: lengths are read on the device."""

    def __init__(self, kernels: Kernels, shape: LatentShape, multiprocessors: int) -> None:
        assert shape.is_served, shape
        self._shape = shape
        self._scale = shape.scale * _LOG2_E
        self._dims: tuple[int, ...] = ()
        if shape.is_for_tensor_cores:
            tile = next((heads for heads in _HEAD_TILES if heads >= shape.heads), _HEAD_TILES[-1])
            suffix = "_e4m3" if shape.is_float8 else ""
            self._kernel = kernels.get(_FILE, f"latent_tensor_{tile}{suffix}", f"PPP{_ROWS}PPPiiiif")
            self._head_tiles, self._split_tokens, blocks = -(-shape.heads // tile), _TILE, 1
            self._shared_bytes = _shared_bytes(shape, tile)
        else:
            self._kernel = kernels.get(_FILE, f"latent_vector_{shape.suffix}", f"PPP{_ROWS}PPPiiiiiif")
            self._head_tiles, self._split_tokens, blocks = shape.heads, _VECTOR_SPLIT_TOKENS, _VECTOR_BLOCKS
            self._shared_bytes, self._dims = 0, (shape.latent, shape.rope)
        self._merge = kernels.get(_FILE, f"merge_splits_{_DTYPE_NAMES[shape.dtype]}", f"{_ROWS}PPPiiii")
        self._blocks_at_once = blocks * multiprocessors
        # Steps of more tokens than this are not split.
        most = 5 * self._blocks_at_once
        self.scratch_bytes = max(self._scratch_bytes(tokens) for tokens in range(1, most + 1))

    def launch(
        self,
        rows: LatentRows,
        scratch: torch.Tensor,
        absorbed: torch.Tensor,
        queries: torch.Tensor,
        cache: LayerCache,
        out: torch.Tensor,
        log_sums: torch.Tensor | None = None,
    ) -> None:
        """Write Σ softmax · latent to ``out`` [tokens, heads, latent].

        ``absorbed`` is [tokens, heads, latent], ``queries`` [tokens, heads, … + rope], rotated; or both are
        columns of one [tokens, heads, latent + rope], the queries all of them.
        ``log_sums``, float32 [tokens, heads], gets the base-2 logarithm of each softmax's denominator:
        with these, attentions to parts of a context are merged.
        """
        shape = self._shape
        pitch = absorbed.stride(1)
        assert absorbed.stride(0) == shape.heads * pitch, absorbed.stride()
        assert absorbed.stride(2) == 1, absorbed.stride()
        assert queries.is_contiguous(), queries.stride()
        assert absorbed.shape[:2] == queries.shape[:2] == (rows.tokens, shape.heads), queries.shape
        assert out.is_contiguous(), out.stride()
        given = rows.arguments(shape)
        splits = self._splits(rows.tokens)
        sums = 0 if log_sums is None else log_sums
        self._kernel(
            (splits, self._head_tiles, rows.tokens),
            _THREADS,
            (
                absorbed,
                queries,
                cache.lines,
                *given,
                out,
                sums,
                scratch,
                shape.heads,
                *self._dims,
                pitch,
                queries.shape[2],
                self._split_tokens,
                self._scale,
            ),
            self._shared_bytes,
        )
        if splits > 1:
            self._merge(
                (-(-shape.latent // _MERGE_DIMS), shape.heads, rows.tokens),
                _THREADS,
                (*given, scratch, out, sums, shape.heads, shape.latent, splits, self._split_tokens),
            )

    def _splits(self, tokens: int) -> int:
        context = self._shape.max_blocks * self._shape.block_tokens
        return split(tokens * self._head_tiles, context, self._blocks_at_once, self._split_tokens)

    def _scratch_bytes(self, tokens: int) -> int:
        splits = self._splits(tokens)
        return 0 if splits == 1 else tokens * splits * self._shape.heads * (self._shape.latent + 2) * 4


class LatentStore:
    """Rope of queries and lines, in place, and the lines' way to the cache: one launch."""

    def __init__(self, kernels: Kernels, shape: LatentShape) -> None:
        self._shape = shape
        self._kernel: Kernel = kernels.get(_FILE, f"rope_store_{shape.suffix}", "PPPPPiiiiii")

    def __call__(
        self,
        queries: torch.Tensor,
        lines: torch.Tensor,
        rotation: torch.Tensor,
        cache: LayerCache,
        slots: torch.Tensor,
    ) -> None:
        """See ``LatentAttention.rope_and_store``; ``slots``: int64 [tokens], below 0: not written."""
        shape, tokens = self._shape, lines.shape[0]
        assert queries.is_contiguous(), queries.stride()
        assert lines.stride(1) == 1, lines.stride()
        assert rotation.is_contiguous(), rotation.stride()
        assert rotation.shape == (tokens, 3, shape.rope // 2), rotation.shape
        assert slots.dtype == torch.int64, slots.dtype
        assert slots.shape == (tokens,), (slots.shape, tokens)
        if not tokens:
            return
        pieces = -(-shape.heads * (shape.rope // 2) // _THREADS)
        self._kernel(
            (tokens, 1 + pieces),
            _THREADS,
            (
                queries,
                lines,
                rotation,
                slots,
                cache.lines,
                shape.heads,
                shape.query_dim,
                shape.latent,
                shape.rope,
                lines.stride(0),
                shape.block_tokens,
            ),
        )


def _shared_bytes(shape: LatentShape, tile: int) -> int:
    """Return what the tensor cores' kernel needs: tiles, scales, queries, probabilities, maxima."""
    stages = _STAGES[shape.is_float8]
    ring = stages * _TILE * (shape.line_dim + 1 if shape.is_float8 else 2 * shape.line_dim)
    return ring + tile * (2 * shape.line_dim + 2 * _TILE) + _WARPS * tile * 4
