"""Multi-head latent attention (arXiv:2405.04434) over paged latents; heads are cut over the group."""

import torch

from models.deepseek_config import LATENT_NORM_EPS, DeepseekConfig
from worker.backends.base import LatentHeads
from worker.context import StepContext, Wanted
from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts


class MultiHeadLatentAttention:
    """softmax(q [Kc, r]ᵀ · scale) Vc of this rank's heads; what it returns is a partial sum over the group.

    c is a token's latent and r its rotated key part, both whole on every rank, as their cache is.
    """

    def __init__(self, parts: Parts, prefix: str, layer: int, config: DeepseekConfig) -> None:
        """Errors: ``UnsupportedModelError`` where the backend has no such attention."""
        weights = parts.weights
        self._backend, self._comm = parts.backend, parts.comm
        self._group = parts.cache[layer].group
        self._down, self._q = weights.matrix(f"{prefix}down_latents"), weights.matrix(f"{prefix}q")
        self._o = weights.matrix(f"{prefix}o")
        self._kv_norm = weights[f"{prefix}kv_norm"]
        self._q_norm = None
        if config.q_latent is not None:
            self._q_norm = RMSNorm(parts, f"{prefix}q_norm", LATENT_NORM_EPS)
        self._line_dim, self._latent = config.line_dim, config.kv_latent
        self._query_dim = config.nope_dim + config.rope_dim
        kv = weights.matrix(f"{prefix}kv")
        up = LatentHeads(kv, config.nope_dim, config.value_dim, config.softmax_scale)
        self._attention = parts.backend.latent_attention(up, parts.cache[layer])

    def __call__(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        step: StepContext,
        wanted: Wanted | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """See ``AttentionBlock``.

        ``rotation``: [tokens, 3, rope_dim / 2], as in ``Backend.rope_and_store``. All tokens are stored.
        """
        plan = step.attention[self._group]
        queries, lines = self._project(x)
        self._attention.rope_and_store(queries, lines, rotation, plan)
        if wanted is not None:
            queries, lines = queries.index_select(0, wanted.tokens), lines.index_select(0, wanted.tokens)
            plan = wanted.attention[self._group]
        attended = self._attention.attend(queries, lines, plan)
        return self._backend.linear_update(residual, attended, self._o, self._comm)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries [tokens, heads, query_dim] and lines [tokens, line_dim], not yet rotated."""
        down = self._backend.linear(x, self._down)
        lines = down[:, -self._line_dim :]
        self._backend.norm_heads(lines[:, : self._latent], self._kv_norm, LATENT_NORM_EPS)
        source = x if self._q_norm is None else self._q_norm(down[:, : -self._line_dim])
        return self._backend.linear(source, self._q).view(x.shape[0], -1, self._query_dim), lines
