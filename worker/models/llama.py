"""Llama's forward pass on one rank: its stage's layers, its share of each."""

import torch

from models.llama import LlamaConfig
from models.spec import ModelSpec
from worker.context import StepContext
from worker.layers.attention import Attention
from worker.layers.mlp import SwiGLU
from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts
from worker.layers.rope import Rope
from worker.layers.vocabulary import Embedding, Head


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, parts: Parts, config: LlamaConfig, layer: int) -> None:
        prefix = f"layers.{layer}."
        self.attention_norm = RMSNorm(parts, f"{prefix}attention_norm", config.norm_eps)
        self.attention = Attention(parts, prefix, layer)
        self.mlp_norm = RMSNorm(parts, f"{prefix}mlp_norm", config.norm_eps)
        self.mlp = SwiGLU(parts, prefix)


class Llama:
    """``StageModel`` of the Llama family."""

    def __init__(
        self, parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
    ) -> None:
        config = model.config
        assert isinstance(config, LlamaConfig)
        self._parts = parts
        self._rope = Rope(
            config.rope_theta, config.head_dim, config.rope_scaling, context, getattr(torch, model.dtype)
        )
        self._layers = [DecoderLayer(parts, config, layer) for layer in layers]
        self._embedding = Embedding(parts, "embedding") if is_first else None
        self._norm = RMSNorm(parts, "norm", config.norm_eps) if is_last else None
        self._head = Head(parts, "head") if is_last else None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """See ``StageModel.embed``."""
        assert self._embedding is not None
        return self._embedding(token_ids)

    def forward(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """See ``StageModel.forward``."""
        rotation = self._rope(step.positions)
        update: torch.Tensor | None = None
        for layer in self._layers:
            x = layer.attention_norm.after(hidden, update)
            wanted = step.wanted if layer is self._layers[-1] else None
            update = layer.attention(x, rotation, step, wanted)
            if wanted is not None:
                hidden = hidden.index_select(0, wanted.tokens)
            x = layer.mlp_norm.after(hidden, update)
            update = layer.mlp(x)
        assert update is not None
        self._parts.backend.reduce_add(hidden, update, self._parts.comm)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``StageModel.logits``."""
        assert self._norm is not None
        assert self._head is not None
        return self._head(self._norm(hidden))
