"""The gated feed-forward block (SwiGLU, arXiv:2002.05202); its inner features are cut over the group."""

import torch

from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts


class SwiGLU:
    """down(silu(gate(x)) · up(x)); what it returns is a partial sum over the group."""

    def __init__(self, parts: Parts, prefix: str) -> None:
        self._backend, self._comm = parts.backend, parts.comm
        self._gate_up, self._down = (
            parts.weights.matrix(f"{prefix}gate_up"),
            parts.weights.matrix(f"{prefix}down"),
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part [tokens, hidden]."""
        backend = self._backend
        return backend.linear(backend.swiglu_linear(x, self._gate_up), self._down)

    def after(
        self, residual: torch.Tensor, update: torch.Tensor | None, norm: RMSNorm
    ) -> torch.Tensor | None:
        """See ``FeedForward.after``."""
        backend = self._backend
        gated = backend.swiglu_linear(norm.after(residual, update), self._gate_up)
        return backend.linear_update(residual, gated, self._down, self._comm)
