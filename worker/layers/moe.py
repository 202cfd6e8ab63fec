"""A mixture of experts in place of a feed-forward block: every token goes through the few it chooses."""

import torch

from models.moe import CHUNK_TOKENS, Routing, splits_tokens
from worker.backends.base import ExpertWeights
from worker.expert_load import CountedLayer
from worker.layers.expert_exchange import ExpertExchange
from worker.layers.mlp import SwiGLU
from worker.layers.norm import RMSNorm
from worker.layers.parts import Parts


class MoE:
    """Σ weight · expert(x) over a token's choices; what it returns is a partial sum over the group.

    Experts are cut over the group as a dense block is (each rank holds a slice of every expert's inner
    features) or placed over it (``Topology.ep``: each rank holds some experts whole, and its part of the
    sum is theirs). The router is whole on every rank. Parameters under ``prefix``: ``router``
    [experts, hidden], ``router_bias`` [experts] if the routing has one, ``experts_gate_up``
    [local experts, 2 * width, hidden] and ``experts_down`` [local experts, hidden, width]; with
    ``inputs_first`` [local experts, hidden, 2 * width] and [local experts, width, hidden].

    An expert that all tokens share is a dense block beside the others: state its parameters as any
    block's (``shared_gate_up``, ``shared_down``, cut over the group) and give
    ``SwiGLU(parts, f"{prefix}shared_")`` as ``shared``. Its partial sum is added here, so that the layer
    still has one all-reduce. It is given the same chunks of tokens, so ``models.moe.expert_chunks`` covers
    it too where its inner features are no more than those of a token's ``top_k`` experts.
    """

    def __init__(
        self,
        parts: Parts,
        prefix: str,
        routing: Routing,
        shared: SwiGLU | None = None,
        *,
        inputs_first: bool = False,
    ) -> None:
        """Errors: ``UnsupportedModelError`` where the backend cannot run such experts."""
        weights, comm = parts.weights, parts.comm
        gate_up = weights.matrix(f"{prefix}experts_gate_up")
        down = weights.matrix(f"{prefix}experts_down")
        if inputs_first:
            assert isinstance(gate_up, torch.Tensor), type(gate_up)
            assert isinstance(down, torch.Tensor), type(down)
            gate_up, down = gate_up.mT, down.mT
        local = weights.local_parts(f"{prefix}experts_gate_up")
        self._routing, self._topology = routing, comm.topology
        self._shared = shared
        self._experts = parts.backend.experts(
            ExpertWeights(
                router=weights[f"{prefix}router"],
                bias=weights[f"{prefix}router_bias"] if routing.has_bias else None,
                gate_up=gate_up,
                down=down,
                first=local.start,
            ),
            routing,
        )
        self._layer, self._first = weights.spec(f"{prefix}router").layer, local.start
        self._exchange = ExpertExchange(comm, self._experts, len(local), shared)
        self._may_split = comm.deals_in_steps

    @property
    def counted(self) -> CountedLayer:
        """How many tokens chose each of this rank's experts."""
        return CountedLayer(self._layer, self._first, self._experts.loads.tolist)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's part [tokens, hidden], computed a chunk of tokens at a time."""
        if x.shape[0] <= CHUNK_TOKENS:
            return self._of_chunk(x)
        found = torch.empty_like(x)
        for first in range(0, x.shape[0], CHUNK_TOKENS):
            found[first : first + CHUNK_TOKENS] = self._of_chunk(x[first : first + CHUNK_TOKENS])
        return found

    def after(
        self, residual: torch.Tensor, update: torch.Tensor | None, norm: RMSNorm
    ) -> torch.Tensor | None:
        """See ``FeedForward.after``."""
        hidden_bytes = residual.shape[1] * residual.element_size()
        has_shared = self._shared is not None
        if self._may_split and splits_tokens(
            self._routing, residual.shape[0], hidden_bytes, self._topology, has_shared=has_shared
        ):
            assert update is not None, "partial sums are pending where there is a group"
            self._exchange.run(residual, update, norm)
            return None
        return self(norm.after(residual, update))

    def _of_chunk(self, x: torch.Tensor) -> torch.Tensor:
        found = self._experts.run(x, self._experts.route(x))
        return found if self._shared is None else found.add_(self._shared(x))
