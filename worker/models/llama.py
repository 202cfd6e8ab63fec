"""Llama's forward pass on one rank: its stage's layers, its share of each."""

import torch

from models.decoder import DecoderConfig
from models.spec import ModelSpec
from worker.layers.attention import Attention
from worker.layers.mlp import SwiGLU
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.models.decoder import Decoder, DecoderLayer


def llama(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> Decoder:
    """Return a stage of Llama."""
    config = model.config
    assert isinstance(config, DecoderConfig)

    def layer(index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        attention, mlp = Attention(parts, prefix, index), SwiGLU(parts, prefix)
        return DecoderLayer(parts, prefix, config.norm_eps, attention, mlp)

    rope = Rope(
        config.rope_theta, config.head_dim, config.rope_scaling, context, getattr(torch, model.dtype)
    )
    stack = [layer(index) for index in layers]
    return Decoder(parts, rope, stack, config.norm_eps, is_first=is_first, is_last=is_last)
