"""A stack of decoder layers over a residual stream: the forward pass that architectures fill in."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from worker.context import StepContext, Wanted
from worker.expert_load import CountedLayer
from worker.layers.moe import MoE
from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts
from worker.layers.vocabulary import Embedding, Head


class AttentionBlock(Protocol):
    """What a layer needs of its attention, whatever it is inside."""

    def __call__(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        step: StepContext,
        wanted: Wanted | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """Return this rank's partial sum, or None where it is in ``residual`` already.

        Both [tokens, hidden], or [wanted, hidden].
        """


class FeedForward(Protocol):
    """What a layer needs of its other block: dense, or a mixture of experts."""

    def after(
        self, residual: torch.Tensor, update: torch.Tensor | None, norm: RMSNorm
    ) -> torch.Tensor | None:
        """Sum attention's partial ``update`` over the group, add it to ``residual``, and run on their norm.

        All [tokens, hidden]; the first two are changed in place. None: nothing is pending. Returns this
        rank's partial sum, or None where the block's own sum is in the residual already.
        """


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self, parts: Parts, prefix: str, norm_eps: float, attention: AttentionBlock, mlp: FeedForward
    ) -> None:
        """Its norms are the parameters ``attention_norm`` and ``mlp_norm`` under ``prefix``."""
        self.attention_norm = RMSNorm(parts, f"{prefix}attention_norm", norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(parts, f"{prefix}mlp_norm", norm_eps)
        self.mlp = mlp


class Decoder:
    """``StageModel`` of decoder layers between an embedding and a norm with a head."""

    def __init__(
        self,
        parts: Parts,
        rope: Callable[[torch.Tensor], torch.Tensor],
        layers: Sequence[DecoderLayer],
        norm_eps: float,
        *,
        is_first: bool,
        is_last: bool,
    ) -> None:
        """``rope`` gives what attention rotates with from positions [tokens]."""
        self._parts, self._rope, self._layers = parts, rope, layers
        self._embedding = Embedding(parts, "embedding") if is_first else None
        self._norm = RMSNorm(parts, "norm", norm_eps) if is_last else None
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
            if wanted is not None:
                hidden = hidden.index_select(0, wanted.tokens)
            update = layer.attention(x, rotation, step, wanted, hidden)
            update = layer.mlp.after(hidden, update, layer.mlp_norm)
        if update is not None:
            self._parts.backend.reduce_add(hidden, update, self._parts.comm)
        return hidden

    def expert_loads(self) -> Sequence[CountedLayer]:
        """See ``StageModel.expert_loads``."""
        return [layer.mlp.counted for layer in self._layers if isinstance(layer.mlp, MoE)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See ``StageModel.logits``."""
        assert self._norm is not None
        assert self._head is not None
        return self._head(self._norm(hidden))
