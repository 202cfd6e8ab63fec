"""The DeepSeek-V3 family's forward pass on one rank: its stage's layers, its share of each."""

import torch

from models.deepseek_config import DeepseekConfig
from models.spec import ModelSpec
from worker.layers.mla import MultiHeadLatentAttention
from worker.layers.mlp import SwiGLU
from worker.layers.moe import MoE
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.models.decoder import Decoder, DecoderLayer, FeedForward


def deepseek(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> Decoder:
    """Return a stage of the DeepSeek-V3 family."""
    config = model.config
    assert isinstance(config, DeepseekConfig)

    def feed_forward(prefix: str, index: int) -> FeedForward:
        if config.routing is None or index < config.num_dense_layers:
            return SwiGLU(parts, prefix)
        shared = SwiGLU(parts, f"{prefix}shared_") if config.shared_size else None
        return MoE(parts, prefix, config.routing, shared)

    def layer(index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        attention = MultiHeadLatentAttention(parts, prefix, index, config)
        return DecoderLayer(parts, prefix, config.norm_eps, attention, feed_forward(prefix, index))

    rope = Rope(config.rope_theta, config.rope_dim, config.yarn, context, getattr(torch, model.dtype))
    stack = [layer(index) for index in layers]
    return Decoder(parts, rope, stack, config.norm_eps, is_first=is_first, is_last=is_last)
