"""The two ends of the model, cut by vocabulary rows over the group."""

import torch

from worker.layers.parts import Parts


class Embedding:
    """Token ids to vectors: each rank gives the rows it holds, the sum over the group is whole."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._backend, self._comm = parts.backend, parts.comm
        self._weight = parts.weights[name]
        (held,) = parts.weights.pieces(name)
        self._first, self._count = held.start, held.end - held.start

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden] of [tokens] int64."""
        found = self._backend.embed(token_ids, self._weight, self._first, self._count)
        self._comm.all_reduce(found)
        return found


class Head:
    """Vectors to logits of this rank's part of the vocabulary."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._backend, self._weight = parts.backend, parts.weights[name]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return float32 [rows, local vocabulary]; entries past the rank's share mean nothing."""
        return self._backend.logits(x, self._weight)
