"""RMSNorm (arXiv:1910.07467), with the reduction and the residual that come before it."""

import torch

from worker.layers.parts import Parts


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, parts: Parts, name: str, eps: float) -> None:
        self._backend, self._comm = parts.backend, parts.comm
        self._weight, self._eps = parts.weights[name], eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the norm of x [tokens, hidden]."""
        return self._backend.rms_norm(x, self._weight, self._eps)

    def after(self, residual: torch.Tensor, update: torch.Tensor | None) -> torch.Tensor:
        """Sum a block's partial ``update`` over the group, add it to ``residual``, return the norm.

        Both are changed in place. None: nothing is pending.
        """
        if update is None:
            return self(residual)
        return self._backend.reduce_add_norm(residual, update, self._weight, self._eps, self._comm)
