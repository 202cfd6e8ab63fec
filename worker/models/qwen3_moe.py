"""Qwen3-MoE's forward pass on one rank: Qwen3's, with experts where its configuration has them."""

import torch

from models.qwen3_moe import Qwen3MoeConfig
from models.spec import ModelSpec
from worker.layers.attention import Attention
from worker.layers.mlp import SwiGLU
from worker.layers.moe import MoE
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.models.decoder import Decoder, DecoderLayer


def qwen3_moe(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> Decoder:
    """Return a stage of Qwen3-MoE."""
    config = model.config
    assert isinstance(config, Qwen3MoeConfig)

    def layer(index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        attention = Attention(parts, prefix, index, head_norm_eps=config.norm_eps)
        is_sparse = index in config.sparse_layers
        mlp = MoE(parts, prefix, config.routing) if is_sparse else SwiGLU(parts, prefix)
        return DecoderLayer(parts, prefix, config.norm_eps, attention, mlp)

    rope = Rope(
        config.rope_theta, config.head_dim, config.rope_scaling, context, getattr(torch, model.dtype)
    )
    stack = [layer(index) for index in layers]
    return Decoder(parts, rope, stack, config.norm_eps, is_first=is_first, is_last=is_last)
