"""Launches of elementwise.cu: norms, rope with the KV write, SwiGLU, embedding; bf16 and float32.

Every kernel moves 16 bytes a thread where lengths and addresses allow it, less where they do not.
"""

from collections.abc import Iterable

import torch

from kv.tensors import LayerCache
from worker.backends.cuda.launch import Kernel, Kernels

_FILE = "elementwise"
_NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}
_WIDTHS = {torch.bfloat16: (8, 4, 1), torch.float32: (4, 2, 1)}
_THREADS = 256
_FEW_THREADS = 128
_MAX_THREADS = 1024
_NORM_CHUNKS = (1, 2, 4)
_NORM_SCALAR_CHUNKS = 16
_LARGEST_FLOAT8_DIM = 256
_FEW_ROWS = 128
"""Up to about a row for each multiprocessor, a row is spread over as many threads as it can use."""


class Elementwise:
    """Owns nothing but its kernels; every output is a fresh tensor of torch's allocator."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._known: dict[str, Kernel] = {}

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight of x [tokens, width]; summed in float32.

        ``x`` may be some columns of a wider matrix, and ``out`` too, which may be ``x`` itself.
        """
        if out is None:
            out = x.new_empty(x.shape)
        name, threads = _norm_shape(x, out, weight)
        if x.shape[0]:
            kernel = self._get(f"norm_{name}", "PPPiiif")
            pitches = x.stride(0), out.stride(0)
            kernel((x.shape[0],), threads, (x, weight, out, x.shape[1], *pitches, eps))
        return out

    def add_norm(
        self, residual: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Add ``update`` to ``residual`` in place; return the norm of the rounded sum."""
        assert residual.is_contiguous(), residual.stride()
        assert update.is_contiguous(), update.stride()
        name, threads = _norm_shape(residual, update, weight)
        out = torch.empty_like(residual)
        if residual.shape[0]:
            kernel = self._get(f"add_norm_{name}", "PPPPif")
            kernel((residual.shape[0],), threads, (residual, update, weight, out, residual.shape[1], eps))
        return out

    def add(self, residual: torch.Tensor, update: torch.Tensor) -> None:
        """Add ``update`` to ``residual`` in place."""
        count = residual.numel()
        width = _width((residual, update), (count,))
        kernel = self._get(f"add_{_NAMES[residual.dtype]}_{width}", "PPq")
        if count:
            kernel((_ceil_div(count, width * _THREADS),), _THREADS, (residual, update, count))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up [tokens, width] of [gate | up]."""
        tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(tokens, width)
        pack = _width((gate_up, out), (width,))
        kernel = self._get(f"swiglu_{_NAMES[gate_up.dtype]}_{pack}", "PPi")
        if tokens:
            grid, threads = _spread(tokens, width // pack)
            kernel(grid, threads, (gate_up, out, width))
        return out

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Return rows ``token_ids - first`` of weight; zeros for ids outside [first, first + count)."""
        tokens, width = token_ids.shape[0], weight.shape[1]
        assert token_ids.dtype == torch.int64, token_ids.dtype
        out = weight.new_empty(tokens, width)
        pack = _width((weight, out), (width,))
        kernel = self._get(f"embed_{_NAMES[weight.dtype]}_{pack}", "PPPqqi")
        if tokens:
            grid, threads = _spread(tokens, width // pack)
            kernel(grid, threads, (token_ids, weight, out, first, count, width))
        return out

    def rope_and_store(
        self, qkv: torch.Tensor, rotation: torch.Tensor, cache: LayerCache, lines: torch.Tensor
    ) -> torch.Tensor:
        """Return the rotated queries [tokens, heads * key_dim]; write rotated keys and values to the cache.

        ``rotation``: [tokens, 3, key_dim / 2]. ``lines``: int64 [tokens], the cache line of each token;
        below 0: nothing is written.
        """
        tokens, stored_values = qkv.shape[0], cache.heads * cache.value_dim
        half = cache.key_dim // 2
        heads = (qkv.shape[1] - stored_values) // cache.key_dim - cache.heads
        assert lines.dtype == torch.int64, lines.dtype
        assert lines.shape == (tokens,), (lines.shape, tokens)
        assert rotation.shape == (tokens, 3, half), (rotation.shape, tokens, half)
        assert rotation.dtype == qkv.dtype, (rotation.dtype, qkv.dtype)
        queries = qkv.new_empty(tokens, heads * cache.key_dim)
        if cache.is_float8:
            self._store_float8(qkv, rotation, cache, lines, queries)
            return queries
        assert qkv.dtype == cache.lines.dtype, (qkv.dtype, cache.lines.dtype)
        pack = _width((qkv, rotation, queries, cache.lines), (half, stored_values))
        kernel = self._get(f"rope_store_{_NAMES[qkv.dtype]}_{pack}", "PPPPPiiii")
        if tokens:
            grid, threads = _spread(tokens, (heads + cache.heads) * (half // pack) + stored_values // pack)
            kernel(
                grid,
                threads,
                (
                    qkv,
                    rotation,
                    lines,
                    queries,
                    cache.lines,
                    heads,
                    cache.heads,
                    cache.key_dim,
                    cache.value_dim,
                ),
            )
        return queries

    def _store_float8(
        self,
        qkv: torch.Tensor,
        rotation: torch.Tensor,
        cache: LayerCache,
        lines: torch.Tensor,
        queries: torch.Tensor,
    ) -> None:
        tokens, heads = qkv.shape[0], queries.shape[1] // cache.key_dim
        assert cache.key_dim % 8 == cache.value_dim % 8 == 0, (cache.key_dim, cache.value_dim)
        assert max(cache.key_dim, cache.value_dim) <= _LARGEST_FLOAT8_DIM, (cache.key_dim, cache.value_dim)
        assert qkv.is_contiguous(), qkv.stride()
        assert rotation.is_contiguous(), rotation.stride()
        kernel = self._get(f"rope_store_e4m3_{_NAMES[qkv.dtype]}", "PPPPPiiiii")
        if tokens:
            # A warp a head.
            grid, threads = _spread(tokens, 32 * (heads + 2 * cache.heads))
            kernel(
                grid,
                threads,
                (
                    qkv,
                    rotation,
                    lines,
                    queries,
                    cache.lines,
                    heads,
                    cache.heads,
                    cache.key_dim,
                    cache.value_dim,
                    cache.page_tokens,
                ),
            )

    def _get(self, name: str, signature: str) -> Kernel:
        kernel = self._known.get(name)
        if kernel is None:
            kernel = self._known[name] = self._kernels.get(_FILE, name, signature)
        return kernel


def _norm_shape(x: torch.Tensor, update: torch.Tensor, weight: torch.Tensor) -> tuple[str, int]:
    """Return dtype, pack and chunks as the kernels' names spell them, and the threads of a row."""
    width = x.shape[1]
    pack = _WIDTHS[x.dtype][0]
    choices: tuple[int, ...] = _NORM_CHUNKS
    # A row of a wider matrix begins where its pitch says.
    addresses = x.data_ptr() | update.data_ptr() | weight.data_ptr()
    places = addresses // x.element_size() | width | x.stride(0) | update.stride(0)
    assert x.stride(1) == update.stride(1) == weight.stride(0) == 1, (x.stride(), update.stride())
    if places % pack:
        pack, choices = 1, (_NORM_SCALAR_CHUNKS,)
    most = _MAX_THREADS if x.shape[0] <= _FEW_ROWS else _THREADS
    packs = width // pack
    fitting = [c for c in choices if packs <= c * most]
    chunks = fitting[0] if fitting else choices[-1]
    threads = _ceil_div(_ceil_div(packs, chunks), 32) * 32
    assert threads <= _MAX_THREADS, f"a norm over {width} features needs more than a block"
    return f"{_NAMES[x.dtype]}_{pack}_{chunks}", threads


def _width(tensors: Iterable[torch.Tensor], lengths: Iterable[int]) -> int:
    """Return how many elements a thread moves: what divides the lengths and the tensors' addresses."""
    pack = 1
    addresses = 0
    for tensor in tensors:
        assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
        addresses |= tensor.data_ptr()
        dtype = tensor.dtype
    for pack in _WIDTHS[dtype]:
        if addresses % (pack * dtype.itemsize) == 0 and all(length % pack == 0 for length in lengths):
            break
    return pack


def _spread(tokens: int, items: int) -> tuple[tuple[int, int], int]:
    """Return the grid, tokens by pieces of a token, and the threads of a piece."""
    threads = _FEW_THREADS if tokens <= _FEW_ROWS else _THREADS
    return (tokens, _ceil_div(items, threads)), threads


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
