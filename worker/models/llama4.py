"""Llama 4's forward pass on one rank: its stage's layers, its share of each."""

import torch

from models.llama4 import Llama4Config
from models.spec import ModelSpec
from worker.context import StepContext, Wanted
from worker.layers.mlp import SwiGLU
from worker.layers.moe import MoE
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.models.decoder import Decoder, DecoderLayer, FeedForward


def llama4(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> Decoder:
    """Return a stage of Llama 4."""
    config = model.config
    assert isinstance(config, Llama4Config)

    def feed_forward(prefix: str, index: int) -> FeedForward:
        if index not in config.sparse_layers:
            return SwiGLU(parts, prefix)
        shared = SwiGLU(parts, f"{prefix}shared_")
        return MoE(parts, prefix, config.routing, shared, inputs_first=True)

    def layer(index: int) -> DecoderLayer:
        prefix = f"layers.{index}."
        attention = _Attention(parts, prefix, index, config)
        return DecoderLayer(parts, prefix, config.norm_eps, attention, feed_forward(prefix, index))

    # Only differences of positions count, and where layers are chunked these are within a chunk.
    is_periodic = config.chunked_layers and config.rope_layers <= config.chunked_layers
    period = min(config.chunk, context) if is_periodic else context
    table = Rope(
        config.rope_theta,
        config.head_dim,
        config.rope_scaling,
        period,
        getattr(torch, model.dtype),
    )

    def rope(positions: torch.Tensor) -> torch.Tensor:
        return table(positions % period if period < context else positions)

    stack = [layer(index) for index in layers]
    return Decoder(parts, rope, stack, config.norm_eps, is_first=is_first, is_last=is_last)


class _Attention:
    """Grouped-query attention that rotates and norms its queries and keys, or scales its queries."""

    def __init__(self, parts: Parts, prefix: str, layer: int, config: Llama4Config) -> None:
        self._backend, self._comm, self._config = parts.backend, parts.comm, config
        self._qkv, self._o = parts.weights[f"{prefix}qkv"], parts.weights[f"{prefix}o"]
        self._cache = parts.cache[layer]
        queries, keys, _ = parts.weights.pieces(f"{prefix}qkv")
        self._num_queries = queries.end - queries.start
        self._num_rotated = self._num_queries + keys.end - keys.start
        self._rotates = layer in config.rope_layers
        self._ones = torch.ones(config.head_dim, dtype=self._qkv.dtype, device=parts.backend.device)

    def __call__(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        step: StepContext,
        wanted: Wanted | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """See ``AttentionBlock``."""
        backend, config, plan = self._backend, self._config, step.attention[self._cache.group]
        qkv = backend.linear(x, self._qkv)
        if self._rotates:
            queries_keys = qkv[:, : self._num_rotated]
            backend.rotate_neighbours(queries_keys, rotation)
            if config.has_qk_norm:
                backend.norm_heads(queries_keys, self._ones, config.norm_eps)
        elif config.is_tuned:
            qkv[:, : self._num_queries] *= self._temperature(step.positions).to(qkv.dtype)
        asked = backend.store(qkv, self._cache, plan)
        if wanted is not None:
            asked, plan = asked.index_select(0, wanted.tokens), wanted.attention[self._cache.group]
        attended = backend.attend(asked, self._cache, plan)
        return backend.linear_update(residual, attended, self._o, self._comm)

    def _temperature(self, positions: torch.Tensor) -> torch.Tensor:
        """Return what queries at positions [tokens] are multiplied with, float32 [tokens, 1].

        The logarithm of a length, as attention over more tokens is flatter (arXiv:2501.19399).
        """
        floors = torch.floor((positions.float() + 1.0) / self._config.tuning_floor)
        return (torch.log1p(floors) * self._config.tuning_scale + 1.0).unsqueeze(-1)
