"""Mixture of experts in plain torch: the reference. One product per expert that has tokens."""

from collections.abc import Callable

import torch

from models.moe import Routing
from worker.backends.base import ExpertWeights, Routed, Weight

Product = Callable[[torch.Tensor, Weight], torch.Tensor]
"""Of x [tokens, in] and a weight."""

_LEAST = 1e-20
"""Added to a sum of scores before it divides, as the published models do."""


def route(logits: torch.Tensor, routing: Routing, bias: torch.Tensor | None) -> Routed:
    """Return what tokens choose by their logits, float32 [tokens, experts]; see ``Routing``."""
    scores = logits.softmax(-1) if routing.scores == "softmax" else logits.sigmoid()
    # A higher logit is a higher score, and does not saturate: many experts' sigmoids may be 1.
    corrected = scores if bias is None else scores + bias
    if bias is None and routing.groups == 1:
        corrected = logits
    if routing.top_groups < routing.groups:
        grouped = corrected.view(-1, routing.groups, routing.experts // routing.groups)
        best = grouped.topk(2, -1).values.sum(-1).topk(routing.top_groups, -1).indices
        is_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        corrected = grouped.masked_fill(is_out.unsqueeze(-1), -torch.inf).flatten(1)
    experts = corrected.topk(routing.top_k, -1).indices
    weights = scores.gather(-1, experts)
    if routing.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + _LEAST)
    return Routed(experts, weights * routing.scale)


class CpuExperts:
    """``Experts`` on host memory. Holds one expert's tokens at a time, fewer than what is charged."""

    def __init__(
        self, weights: ExpertWeights, routing: Routing, linear: Product, swiglu_linear: Product
    ) -> None:
        self._weights, self._routing = weights, routing
        self._linear, self._swiglu_linear = linear, swiglu_linear
        self.loads = torch.zeros(weights.gate_up.shape[0], dtype=torch.int64)

    def route(self, x: torch.Tensor) -> Routed:
        """See ``Experts.route``."""
        logits = self._linear(x.float(), self._weights.router.float())
        return route(logits, self._routing, self._weights.bias)

    def run(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """See ``Experts.run``."""
        num_local = self._weights.gate_up.shape[0]
        flat = routed.experts.flatten() - self._weights.first
        # Choices of experts elsewhere stand last, behind those of the local ones.
        flat = flat.masked_fill_((flat < 0) | (flat >= num_local), num_local)
        # A stable sort keeps an expert's tokens, and so each token's sum, in the same order at every size.
        order = flat.argsort(stable=True)
        tokens = order // routed.experts.shape[1]
        weights = routed.weights.flatten()[order].unsqueeze(-1)
        chosen = flat.bincount(minlength=num_local)[:num_local]
        self.loads += chosen
        counts = chosen.tolist()
        total = torch.zeros(x.shape, dtype=torch.float32)
        end = 0
        for expert, count in enumerate(counts):
            if count:
                own = slice(end, end + count)
                end += count
                total.index_add_(0, tokens[own], self._one(expert, x[tokens[own]], weights[own]))
        return total.to(x.dtype)

    def _one(self, expert: int, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted float32 output of one expert for its tokens."""
        if self._routing.weighs == "input":
            x = (x * weights).to(x.dtype)
        inner = self._swiglu_linear(x, self._weights.gate_up[expert])
        out = self._linear(inner, self._weights.down[expert]).float()
        return out if self._routing.weighs == "input" else out.mul_(weights)
