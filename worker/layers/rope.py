"""Rotary position embedding (arXiv:2104.09864) and three ways to stretch it.

Formulas of the scaled variants: transformers' ``modeling_rope_utils`` (linear; llama3, as published
with Llama 3.1; yarn, arXiv:2309.00071).
"""

import math

import torch

from models.rope import RopeScaling
from models.yarn import Yarn


def inverse_frequencies(theta: float, dim: int, scaling: RopeScaling | Yarn | None) -> torch.Tensor:
    """Return the angle per position of each pair of a head's features, float32 [dim / 2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim)
    if scaling is None:
        return frequencies
    stretched = frequencies / scaling.factor
    if isinstance(scaling, Yarn):
        first, last = scaling.blended(theta, dim)
        ramp = ((torch.arange(dim // 2).float() - first) / (last - first)).clamp_(0, 1)
        return stretched * ramp + frequencies * (1 - ramp)
    if scaling.kind == "linear":
        return stretched
    # Short waves stay, long ones are stretched, those between are blended (none, where low is high).
    waves = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (scaling.original_max_position_embeddings / waves - low) / max(high - low, 1e-9)
    blended = (1 - blend) * stretched + blend * frequencies
    found = torch.where(blend < 0, stretched, blended)
    return torch.where(blend > 1, frequencies, found)


class Rope:
    """Cosines and sines of every position of the context."""

    def __init__(
        self, theta: float, dim: int, scaling: RopeScaling | Yarn | None, context: int, dtype: torch.dtype
    ) -> None:
        angles = torch.outer(torch.arange(context).float(), inverse_frequencies(theta, dim, scaling))
        scale = scaling.rotation_scale if isinstance(scaling, Yarn) else 1.0
        cos, sin = angles.cos() * scale, angles.sin() * scale
        self._table = torch.stack((cos, -sin, sin), dim=1).to(dtype)

    def __call__(self, positions: torch.Tensor) -> torch.Tensor:
        """Return [tokens, 3, dim / 2]: cos, -sin, sin of each position."""
        return self._table[positions]
