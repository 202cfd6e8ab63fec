"""Grouped-query attention with rope over paged KV; heads are cut over the group."""

import torch

from worker.context import StepContext, Wanted
from worker.layers.parts import Parts


class Attention:
    """softmax(q kᵀ / √d) v of this rank's heads; what it returns is a partial sum over the group."""

    def __init__(
        self, parts: Parts, prefix: str, layer: int, *, head_norm_eps: float | None = None
    ) -> None:
        """``head_norm_eps``: that of the norms ``q_norm`` and ``k_norm`` [head_dim] under ``prefix``.

        They are of each head's queries and keys before these rotate; None: there are none.
        """
        self._backend, self._comm = parts.backend, parts.comm
        self._qkv, self._o = parts.weights[f"{prefix}qkv"], parts.weights[f"{prefix}o"]
        self._cache = parts.cache[layer]
        queries, keys, values = parts.weights.pieces(f"{prefix}qkv")
        assert keys.end - keys.start == self._cache.heads * self._cache.key_dim
        assert values.end - values.start == self._cache.heads * self._cache.value_dim
        assert queries.end - queries.start == self._o.shape[1]
        self._eps, self._norms = head_norm_eps or 0.0, list[tuple[slice, torch.Tensor]]()
        if head_norm_eps is not None:
            first_key, end = self._o.shape[1], self._o.shape[1] + keys.end - keys.start
            self._norms = [
                (slice(0, first_key), parts.weights[f"{prefix}q_norm"]),
                (slice(first_key, end), parts.weights[f"{prefix}k_norm"]),
            ]

    def __call__(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        step: StepContext,
        wanted: Wanted | None,
        residual: torch.Tensor,
    ) -> torch.Tensor | None:
        """See ``AttentionBlock``.

        ``rotation``: as in ``Backend.rope_and_store``. Keys and values of all tokens are stored.
        """
        plan = step.attention[self._cache.group]
        qkv = self._backend.linear(x, self._qkv)
        for columns, weight in self._norms:
            self._backend.norm_heads(qkv[:, columns], weight, self._eps)
        rotated = self._backend.rope_and_store(qkv, rotation, self._cache, plan)
        if wanted is not None:
            rotated, plan = rotated.index_select(0, wanted.tokens), wanted.attention[self._cache.group]
        attended = self._backend.attend(rotated, self._cache, plan)
        return self._backend.linear_update(residual, attended, self._o, self._comm)
