"""Noise that a draw takes from (seed, position, token id) alone: the same in any batch and any layout.

A 64-bit key of seed and position is made by the host (splitmix64's finaliser, Steele, Lea and Flood
2014); a token's bits are murmur3's 32-bit finaliser (Appleby) of its hashed id, with half of the key
before the first multiplication and half after it. Only wrapping int32 arithmetic, so the bits are those
of every device.
"""

import torch

_MASK64 = (1 << 64) - 1
_GOLDEN64 = 0x9E3779B97F4A7C15


def _int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


_FIRST, _SECOND, _ID = _int32(0x85EBCA6B), _int32(0xC2B2AE35), _int32(0x9E3779B1)


def _splitmix64(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)


def _fold(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Do ``x ^= x >>> shift``; torch's shift of int32 keeps the sign, the mask takes it away."""
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))


def hash_ids(token_ids: torch.Tensor) -> torch.Tensor:
    """Return the int32 hash of each id: what of ``bits`` is the same for every row. Never two equal."""
    return _fold(_fold(token_ids.to(torch.int32).mul_(_ID), 16).mul_(_FIRST), 13)


def bits(seed: int, position: int, hashed_ids: torch.Tensor) -> torch.Tensor:
    """Return 32 random bits per id, as int32. ``hashed_ids``: from ``hash_ids``."""
    key = _splitmix64((_splitmix64(seed & _MASK64) + (position + 1) * _GOLDEN64) & _MASK64)
    x = hashed_ids.bitwise_xor(_int32(key))
    _fold(x, 16).mul_(_FIRST).add_(_int32(key >> 32))
    return _fold(_fold(x, 13).mul_(_SECOND), 16)


def uniform(seed: int, position: int, hashed_ids: torch.Tensor) -> torch.Tensor:
    """Return float32 in (0, 1), in steps of 2**-32 where float32 has them (near 0)."""
    v = bits(seed, position, hashed_ids).to(torch.float32)
    # From -2**31 .. 2**31 (rounded) to 0 .. 1; float32 would round an addition, so the halves differ.
    return v.mul_(2.0**-32).add_((v < 0).to(torch.float32)).clamp_(2.0**-33, 1.0 - 2.0**-24)


def gumbel(seed: int, position: int, hashed_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise, float32: -log(-log(u)), the argmax of logits + which is a draw.

    With u = 1 - v: the fine steps of ``uniform`` near 0 are those of the upper tail, which decides.
    Source: Gumbel 1954; Maddison, Tarlow and Minka 2014 (arXiv:1411.0030).
    """
    return uniform(seed, position, hashed_ids).neg_().log1p_().neg_().log_().neg_()
