"""Placed experts and split tokens: each rank sends its own tokens to the ranks of their experts.

The form of a layer for large steps (``models.moe.splits_tokens``): attention's partial sums are scattered
instead of reduced, so a rank adds, normalises and routes its own share of the tokens alone; shares are
gathered again when the experts' outputs are added.
"""

import torch
from torch.nn import functional

from models.moe import CHUNK_TOKENS
from worker.backends.base import Experts, Routed
from worker.comm import Communicator
from worker.layers.mlp import SwiGLU
from worker.layers.norm import RMSNorm


class ExpertExchange:
    """One layer's block over split tokens. All ranks of a group call it for the same steps."""

    def __init__(
        self, comm: Communicator, experts: Experts, experts_each: int, shared: SwiGLU | None
    ) -> None:
        """``experts_each``: that a rank holds, neighbours, in rank order."""
        self._comm, self._experts, self._shared = comm, experts, shared
        self._experts_each = experts_each
        self._ranks = comm.topology.tp
        self._rank = comm.topology.tp_rank(comm.rank)

    def run(self, residual: torch.Tensor, update: torch.Tensor, norm: RMSNorm) -> None:
        """Add attention's partial ``update`` to ``residual`` and then the block of their ``norm``.

        Both are [tokens, hidden]; the residual, in place, is whole on every rank again.
        """
        tokens = residual.shape[0]
        share = -(-tokens // self._ranks)
        first = min(self._rank * share, tokens)
        own = residual[first : first + share]
        own.add_(self._comm.reduce_scatter(_padded(update, share * self._ranks))[: own.shape[0]])
        x = norm(own)
        # As many rounds on every rank, of which the last ones may have fewer tokens or none.
        each = max(CHUNK_TOKENS // self._ranks, 1)
        for start in range(0, share, each):
            part = x[start : start + each]
            found = self._routed(part)
            if self._shared is not None:
                found += self._of_all(self._shared, part, min(each, share - start))
            own[start : start + each].add_(found)
        gathered = self._comm.all_gather(_padded(own, share))
        residual.copy_(gathered.view(-1, residual.shape[1])[:tokens])

    def _routed(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the routed experts of all ranks make of this rank's tokens, [tokens, hidden]."""
        routed = self._experts.route(x)
        # A token goes to a rank once, however many of its choices are there: [tokens, ranks].
        is_sent = torch.zeros(x.shape[0], self._ranks, dtype=torch.bool, device=x.device)
        is_sent.scatter_(1, routed.experts // self._experts_each, True)
        tokens = is_sent.T.nonzero()[:, 1]  # Rank by rank.
        counts = is_sent.sum(0).tolist()
        arrived, told, senders = self._dealt(x[tokens], routed, tokens, counts)
        returned = self._comm.all_to_all(self._experts.run(arrived, told), senders)
        total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        # A rank at a time, so that each token's sum is in rank order on any device.
        split = torch.split_with_sizes
        for mine, part in zip(split(tokens, counts), split(returned, counts), strict=True):
            total.index_add_(0, mine, part.float())
        return total.to(x.dtype)

    def _dealt(
        self, x: torch.Tensor, routed: Routed, tokens: torch.Tensor, counts: list[int]
    ) -> tuple[torch.Tensor, Routed, list[int]]:
        """Return the tokens that came to this rank, all their choices, and how many each rank sent."""
        top_k = routed.experts.shape[1]
        choices = torch.empty(len(tokens), 2 * top_k + 1, dtype=torch.int32, device=x.device)
        choices[:, :top_k] = routed.experts[tokens]
        choices[:, top_k:-1] = routed.weights[tokens].view(torch.int32)
        choices[:, -1] = self._rank
        arrived = self._comm.all_to_all(x, counts)
        told = self._comm.all_to_all(choices, counts)
        weights = told[:, top_k:-1].contiguous().view(torch.float32)
        senders = told[:, -1].bincount(minlength=self._ranks).tolist()
        return arrived, Routed(told[:, :top_k].long(), weights), senders

    def _of_all(self, shared: SwiGLU, x: torch.Tensor, share: int) -> torch.Tensor:
        """Return what shared experts, which are cut over the group, make of this rank's tokens."""
        everybody = self._comm.all_gather(_padded(x, share)).view(-1, x.shape[1])
        return self._comm.reduce_scatter(shared(everybody))[: x.shape[0]]


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x if x.shape[0] == rows else functional.pad(x, (0, 0, 0, rows - x.shape[0]))
