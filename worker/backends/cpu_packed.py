"""Packed weights on a CPU: exact, a few rows at a time. The reference of all kernels that take them.

A value is its code times its scale in float32 (exact for int4 with scales of 16 bits), rounded to the dtype
that is computed in.
"""

import math
from collections.abc import Iterator

import torch

from models.packing import BLOCK, GROUP
from worker.backends.base import BlockFloat8Weight, Int4Weight

TILE_ELEMENTS = 1 << 20
"""Unpacked together, at some 9 bytes each while they are: inside the plan's workspace line."""


def unpacked_tiles(
    weight: Int4Weight | BlockFloat8Weight, dtype: torch.dtype, multiple: int = 1
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield a matrix [out, in] in rows: which they are, and what they are in ``dtype``.

    As many rows at a time as ``TILE_ELEMENTS`` allow, but whole blocks, and a multiple of ``multiple``.
    """
    rows, columns = weight.shape
    together = math.lcm(multiple, BLOCK if isinstance(weight, BlockFloat8Weight) else 1)
    step = max(TILE_ELEMENTS // (columns * together), 1) * together
    for first in range(0, rows, step):
        some = slice(first, min(first + step, rows))
        if isinstance(weight, Int4Weight):
            yield some, _of_int4(weight.words[some], weight.scales[some]).to(dtype)
        else:
            blocks = slice(first // BLOCK, -(-some.stop // BLOCK))
            yield some, _of_float8(weight.codes[some], weight.scales[blocks]).to(dtype)


def _of_int4(words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [rows, in]."""
    # Words are little-endian: byte k // 2 of a row has value k in its lower half, k + 1 in its upper one.
    octets = words.contiguous().view(torch.uint8)
    codes = torch.stack((octets & 0xF, octets >> 4), -1).view(words.shape[0], -1, GROUP)
    return codes.float().sub_(8).mul_(scales.unsqueeze(-1)).flatten(1)


def _of_float8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return float32 [rows, in]."""
    values = codes.float()
    for block, factors in enumerate(scales):
        wide = factors.repeat_interleave(BLOCK)[: values.shape[1]]
        values[block * BLOCK : (block + 1) * BLOCK].mul_(wide)
    return values
