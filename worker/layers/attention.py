"""Grouped-query attention with rope over paged KV; heads are cut over the group."""

import torch

from worker.context import StepContext, Wanted
from worker.layers.parts import Parts


class Attention:
    """softmax(q kᵀ / √d) v of this rank's heads; what it returns is a partial sum over the group."""

    def __init__(self, parts: Parts, prefix: str, layer: int) -> None:
        self._backend = parts.backend
        self._qkv, self._o = parts.weights[f"{prefix}qkv"], parts.weights[f"{prefix}o"]
        self._cache = parts.cache[layer]
        queries, keys, values = parts.weights.pieces(f"{prefix}qkv")
        assert keys.end - keys.start == self._cache.heads * self._cache.key_dim
        assert values.end - values.start == self._cache.heads * self._cache.value_dim
        assert queries.end - queries.start == self._o.shape[1]

    def __call__(
        self, x: torch.Tensor, rotation: torch.Tensor, step: StepContext, wanted: Wanted | None = None
    ) -> torch.Tensor:
        """Return this rank's part [tokens, hidden], or [wanted, hidden].

        ``rotation``: as in ``Backend.rope_and_store``. Keys and values of all tokens are stored.
        """
        plan = step.attention[self._cache.group]
        qkv = self._backend.linear(x, self._qkv)
        rotated = self._backend.rope_and_store(qkv, rotation, self._cache, plan)
        if wanted is not None:
            rotated, plan = rotated.index_select(0, wanted.tokens), wanted.attention[self._cache.group]
        return self._backend.linear(self._backend.attend(rotated, self._cache, plan), self._o)
