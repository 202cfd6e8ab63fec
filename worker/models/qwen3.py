"""Qwen3's forward pass on one rank: Llama's, with normed queries and keys."""

import torch

from models.decoder import DecoderConfig
from models.spec import ModelSpec
from worker.layers.attention import Attention
from worker.layers.mlp import SwiGLU
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.models.decoder import Decoder, DecoderLayer


def qwen3(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> Decoder:
    """Return a stage of Qwen3."""
    config = model.config
    assert isinstance(config, DecoderConfig)

    def layer(index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        attention = Attention(parts, prefix, index, head_norm_eps=config.norm_eps)
        return DecoderLayer(parts, prefix, config.norm_eps, attention, SwiGLU(parts, prefix))

    rope = Rope(
        config.rope_theta, config.head_dim, config.rope_scaling, context, getattr(torch, model.dtype)
    )
    stack = [layer(index) for index in layers]
    return Decoder(parts, rope, stack, config.norm_eps, is_first=is_first, is_last=is_last)
