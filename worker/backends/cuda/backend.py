"""``Backend`` on one NVIDIA GPU: our kernels where they are the fastest, libraries' elsewhere."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from kv.tensors import LayerCache
from models.moe import Routing
from protocol.errors import UnsupportedModelError
from worker.backends.base import Experts, ExpertWeights, LatentAttention, LatentHeads, Weight, plain
from worker.backends.cuda.comm import CudaCommunicator
from worker.backends.cuda.elementwise import Elementwise
from worker.backends.cuda.launch import Kernels
from worker.backends.cuda.linear import Linear
from worker.backends.cuda.moe import CudaExperts
from worker.backends.cuda.pieces import SIZES, Pieces
from worker.comm import Communicator
from worker.context import AttentionPlan

_ROWS_ADDED_BY_LINEAR = SIZES[-1] + 1
"""Steps that no graph holds. What a smaller one would spare lies in the L2 cache."""


class PlannedAttention(Protocol):
    """What the backend needs of attention over paged KV."""

    def run(
        self, queries: torch.Tensor, cache: LayerCache, plan: Any, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return [tokens, heads * value_dim] of rotated queries [tokens, heads * key_dim], in ``out``."""

    def latents(self, heads: LatentHeads, cache: LayerCache) -> LatentAttention:
        """Return a layer's attention over latents."""


def latents_refused(line_dim: int) -> UnsupportedModelError:
    """Return the refusal of a model whose KV is latents, ``line_dim`` elements a token."""
    return UnsupportedModelError(
        f"attention over latents was asked for on a GPU, of lines of {line_dim} elements, which are more "
        "than its kernels take: serve this model with --device cpu"
    )


@dataclass(frozen=True, slots=True)
class CudaStepPlan(AttentionPlan):
    """One step in one KV group."""

    lines: torch.Tensor
    """int64 [tokens]: the cache line each token is written to, -1: none."""
    attention: Any
    """What the attention prepared, and only it looks inside; or the ``Pieces`` that are being captured."""


class CudaBackend:
    """See ``Backend``. Everything is launched on torch's current stream and can be captured."""

    def __init__(
        self,
        device: torch.device,
        kernels: Kernels,
        attention: PlannedAttention,
        linear: Linear | None = None,
    ) -> None:
        """``linear``: one that knows this machine's measured algorithms."""
        self.device = device
        self._kernels = kernels
        self._elementwise = Elementwise(kernels)
        self._linear = linear or Linear(kernels)
        self._attention = attention

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``Backend.linear``."""
        return self._linear(x, plain(weight))

    def linear_update(
        self, residual: torch.Tensor, x: torch.Tensor, weight: Weight, comm: Communicator
    ) -> torch.Tensor | None:
        """See ``Backend.linear_update``; by the number of rows alone, so a step's bits are its own."""
        if comm.topology.tp > 1 or x.shape[0] < _ROWS_ADDED_BY_LINEAR:
            return self._linear(x, plain(weight))
        self._linear.add(residual, x, plain(weight))
        return None

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """See ``Backend.logits``."""
        return self._linear(x, plain(weight), torch.float32)

    def swiglu_linear(self, x: torch.Tensor, gate_up: Weight) -> torch.Tensor:
        """See ``Backend.swiglu_linear``; one kernel for few rows."""
        matrix = plain(gate_up)
        fused = self._linear.gated(x, matrix)
        return self._elementwise.swiglu(self._linear(x, matrix)) if fused is None else fused

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See ``Backend.rms_norm``."""
        return self._elementwise.rms_norm(x, weight, eps)

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """See ``Backend.norm_heads``."""
        if x.shape[1] == weight.shape[0]:
            self._elementwise.rms_norm(x, weight, eps, out=x)
            return
        heads = x.reshape(-1, weight.shape[0])
        x.copy_(self._elementwise.rms_norm(heads, weight, eps).view(x.shape))

    def reduce_add(self, residual: torch.Tensor, update: torch.Tensor, comm: Communicator) -> None:
        """See ``Backend.reduce_add``."""
        if comm.topology.tp > 1:
            comm.all_reduce(update)
        self._elementwise.add(residual, update)

    def reduce_add_norm(
        self,
        residual: torch.Tensor,
        update: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        comm: Communicator,
    ) -> torch.Tensor:
        """See ``Backend.reduce_add_norm``."""
        if comm.topology.tp > 1:
            assert isinstance(comm, CudaCommunicator)
            if comm.fuses(update):
                return comm.all_reduce_norm(update, residual, weight, eps)
            comm.all_reduce(update)
        return self._elementwise.add_norm(residual, update, weight, eps)

    def experts(self, weights: ExpertWeights, routing: Routing) -> Experts:
        """See ``Backend.experts``."""
        return CudaExperts(self._kernels, self._linear, self._elementwise, weights, routing)

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """See ``Backend.embed``."""
        return self._elementwise.embed(token_ids, weight, first, count)

    def rope_and_store(
        self, qkv: torch.Tensor, rotation: torch.Tensor, cache: LayerCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """See ``Backend.rope_and_store``."""
        assert isinstance(plan, CudaStepPlan)
        return self._elementwise.rope_and_store(qkv, rotation, cache, plan.lines)

    def rotate_neighbours(self, x: torch.Tensor, rotation: torch.Tensor) -> None:
        """See ``Backend.rotate_neighbours``."""
        raise UnsupportedModelError(
            f"{x.shape[1]} features were to rotate in {rotation.shape[2]} neighbouring pairs a head on a "
            "GPU, whose kernel rotates the halves of heads: serve this model with --device cpu"
        )

    def store(self, qkv: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:  # noqa: ARG002
        """See ``Backend.store``."""
        raise UnsupportedModelError(
            f"keys of {cache.heads} heads were to be stored without rope on a GPU, whose kernel rotates "
            "what it stores: serve this model with --device cpu"
        )

    def attend(self, rotated: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """See ``Backend.attend``."""
        assert isinstance(plan, CudaStepPlan)
        if isinstance(plan.attention, Pieces):
            width = rotated.shape[1] // cache.key_dim * cache.value_dim

            def between(plan: AttentionPlan, asked: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
                self._attention.run(asked[0], cache, plan, out)

            return plan.attention.attend(between, cache.group, (rotated,), width)
        return self._attention.run(rotated, cache, plan.attention)

    def latent_attention(self, heads: LatentHeads, cache: LayerCache) -> LatentAttention:
        """See ``Backend.latent_attention``."""
        return self._attention.latents(heads, cache)
