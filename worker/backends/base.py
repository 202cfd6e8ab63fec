"""The kernels that layers are written in. A model file never asks which backend it runs on."""

from typing import Protocol

import torch

from kv.tensors import LayerCache
from worker.comm import Communicator
from worker.context import AttentionPlan


class Backend(Protocol):
    """Kernels of one device kind. ``x`` is [tokens, features] everywhere."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T``; weight is [out, in]."""

    def logits(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return ``x @ weight.T`` in float32, whatever the dtype of its factors."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight."""

    def reduce_add(self, residual: torch.Tensor, update: torch.Tensor, comm: Communicator) -> None:
        """Sum ``update`` over the tp group and add it to ``residual``, both in place."""

    def reduce_add_norm(
        self,
        residual: torch.Tensor,
        update: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        comm: Communicator,
    ) -> torch.Tensor:
        """``reduce_add``, then return the norm of the new residual: one kernel where that is faster."""

    def swiglu_linear(self, x: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
        """Return silu(gate) · up of ``x @ gate_up.T``, whose features are gate first and then up."""

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Return rows ``token_ids - first`` of weight, zeros for ids outside [first, first + count)."""

    def rope_and_store(
        self, qkv: torch.Tensor, rotation: torch.Tensor, cache: LayerCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """Rotate q and k of [q | k | v] and write k and v to their cache lines; return what to attend with.

        ``rotation`` is [tokens, 3, key_dim / 2]: cos, -sin, sin. ``qkv`` may be changed.
        """

    def attend(self, rotated: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """Return causal attention of each row over its context: [tokens, heads * value_dim].

        Scores are scaled by 1 / sqrt(key_dim). ``rotated``: from ``rope_and_store`` of the same tokens.
        """
