"""Keys and values as e4m3 codes, each head of each token under a power of two of its own.

The scale 2^k is the least with which the largest magnitude is at most 448, e4m3's largest; its byte is
k + 127, the exponent of a float32 (the OCP's E8M0). What a token stores follows from its own key or value
alone. A code times a power of two has 4 significant bits, so bf16 holds it exactly: whatever reads a
cache sees the same numbers.
"""

from collections.abc import Iterator

import torch

from kv.tensors import LayerCache

_MANTISSA_BITS = 23
_BELOW_448 = 0x1FFFFF  # Carries into the exponent where a mantissa is over that of 448 = 1.75 · 2^8.


def scale_bytes(largest: torch.Tensor) -> torch.Tensor:
    """Return the scales of float32 magnitudes, uint8; 1 (2^-126) is the least."""
    bits = largest.float().view(torch.int32)
    exponents = ((bits + _BELOW_448) >> _MANTISSA_BITS) - 8
    return exponents.clamp_(1, 247).to(torch.uint8)


def scales_of(scales: torch.Tensor) -> torch.Tensor:
    """Return what scale bytes stand for, float32."""
    return (scales.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)


def round_in_place(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round x [tokens, heads, dim] to what a cache holds of it.

    Return the codes, float8_e4m3fn [tokens, heads, dim], and the scales' bytes, uint8 [tokens, heads].
    """
    scales = scale_bytes(x.abs().amax(-1))
    factors = scales_of(scales).unsqueeze(-1)
    codes = (x / factors).to(torch.float8_e4m3fn)
    x.copy_(codes).mul_(factors.to(x.dtype))
    return codes, scales


def store_rounded(
    lines: torch.Tensor, cache: LayerCache, at: torch.Tensor, kept: torch.Tensor | None = None
) -> None:
    """Write new lines [tokens, heads * (key_dim + value_dim)] to a float8 cache, and round them in place.

    ``kept``: which of the tokens are written, int64; None: all. ``at``: their places in the cache, int64.
    """
    stored, scales = cache.codes(cache.lines), cache.scales(cache.lines)
    block, inside = at // stored.shape[1], at % stored.shape[1]
    for part, columns in _parts(cache):
        found = round_in_place(lines[:, columns].view(lines.shape[0], cache.heads, -1))
        # Not every operation that moves bytes is there for float8.
        codes, own_scales = found[0].view(torch.uint8).flatten(1), found[1]
        if kept is not None:
            codes, own_scales = codes[kept], own_scales[kept]
        stored.view(torch.uint8)[block, inside, columns] = codes
        scales[block, :, part, inside] = own_scales


def read_blocks(
    cache: LayerCache, blocks: torch.Tensor, scratch: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return lines of some blocks, [blocks * block_tokens, heads * (key_dim + value_dim)], in ``dtype``.

    ``scratch``, uint8, holds them and, behind them, the blocks' pages.
    """
    count, width = len(blocks), cache.heads * (cache.key_dim + cache.value_dim)
    block_tokens = cache.codes(cache.lines).shape[1]
    size = count * block_tokens * width * dtype.itemsize
    pages = scratch[size : size + count * cache.lines.shape[1]].view(count, -1)
    torch.index_select(cache.lines, 0, blocks, out=pages)
    lines = scratch[:size].view(dtype).view(count * block_tokens, width)
    read_pages(cache, pages, lines.view(count, block_tokens, width))
    return lines


def read_pages(cache: LayerCache, pages: torch.Tensor, out: torch.Tensor) -> None:
    """Write the lines in float8 pages to ``out`` [pages, page tokens, heads * (key_dim + value_dim)]."""
    out.copy_(cache.codes(pages))
    factors = scales_of(cache.scales(pages)).to(out.dtype)
    for part, columns in _parts(cache):
        heads = out[:, :, columns].view(*out.shape[:2], cache.heads, -1)
        heads.mul_(factors[:, :, part].transpose(1, 2).unsqueeze(-1))


def _parts(cache: LayerCache) -> Iterator[tuple[int, slice]]:
    """Yield which columns of a line are keys, 0, and values, 1, where there are any."""
    split = cache.heads * cache.key_dim
    yield 0, slice(0, split)
    if cache.value_dim:
        yield 1, slice(split, split + cache.heads * cache.value_dim)
