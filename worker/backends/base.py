"""The kernels that layers are written in. A model file never asks which backend it runs on."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kv.tensors import LayerCache
from models.moe import Routing
from worker.comm import Communicator
from worker.context import AttentionPlan


@dataclass(frozen=True, slots=True)
class Routed:
    """Which experts tokens go to, and how much each counts."""

    experts: torch.Tensor
    """int64 [tokens, top_k]: ids among all experts of the layer, different ones for a token."""
    weights: torch.Tensor
    """float32 [tokens, top_k]."""


@dataclass(frozen=True, slots=True)
class Int4Weight:
    """Weights of four bits in groups of 32 along a row, as compressed-tensors packs them (symmetric).

    Element k of a row is (code - 8) · scale of its group, where code is bits [4 (k % 8), 4 (k % 8) + 4) of
    word k // 8.
    """

    words: torch.Tensor
    """int32 [..., out, in / 8]."""
    scales: torch.Tensor
    """[..., out, in / 32]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Unpacked: [..., out, in]."""
        return (*self.words.shape[:-1], self.words.shape[-1] * 8)

    def __getitem__(self, part: int | slice) -> "Int4Weight":
        """Return some of what the first dimension counts, a view."""
        return Int4Weight(self.words[part], self.scales[part])


@dataclass(frozen=True, slots=True)
class BlockFloat8Weight:
    """Weights of eight bits in blocks of 128 × 128, as DeepSeek-V3's checkpoints have them.

    Element [i, k] is code [i, k] · scale [i // 128, k // 128]. A matrix begins with a whole block; the last
    ones of its rows and columns may be less.
    """

    codes: torch.Tensor
    """float8_e4m3fn [..., out, in]."""
    scales: torch.Tensor
    """float32 [..., ceil(out / 128), ceil(in / 128)]."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Unpacked: [..., out, in]."""
        return tuple(self.codes.shape)

    def __getitem__(self, part: int) -> "BlockFloat8Weight":
        """Return one matrix of a stack, a view."""
        assert self.codes.dim() > 2, self.shape
        return BlockFloat8Weight(self.codes[part], self.scales[part])


Weight = torch.Tensor | Int4Weight | BlockFloat8Weight
"""A matrix, or a stack of them, as it lies in memory."""


def plain(weight: Weight) -> torch.Tensor:
    """Return a weight of a backend that takes no packed ones there, and refused them at boot."""
    assert isinstance(weight, torch.Tensor), type(weight)
    return weight


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """What a rank holds of one layer's routed experts."""

    router: torch.Tensor
    """[experts, hidden]."""
    bias: torch.Tensor | None
    """[experts], float32: corrects the scores for the choice; None: nothing does."""
    gate_up: Weight
    """[local experts, 2 * width, hidden], each expert's gate first and then up; width: this rank's part of
    an expert's inner features. May be a view of what lies in memory as [local experts, hidden, 2 * width],
    which its strides then say."""
    down: Weight
    """[local experts, hidden, width]; or a view likewise."""
    first: int = 0
    """Id of the first local expert; the others follow it. Where experts are cut, all are local."""


class Experts(Protocol):
    """The routed experts of one layer on one rank, ready to run; made once, by ``Backend.experts``."""

    loads: torch.Tensor
    """int64 [local experts], on the device: tokens of all runs that chose each."""

    def route(self, x: torch.Tensor) -> Routed:
        """Return what each token of x [tokens, hidden] chooses, as its ``Routing`` says.

        Computed in float32, so that all ranks of a group, which hold the same x, choose alike.
        """

    def run(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Return Σ weight · down(silu(gate(x)) · up(x)) over each token's local choices, [tokens, hidden].

        A partial sum over the group: of inner features where these are cut, of experts where they are
        placed; choices that are not local count nothing. Where the routing weighs inputs,
        down(silu(gate(weight · x)) · up(weight · x)). Holds what ``models.moe.expert_chunks`` charges.
        """


@dataclass(frozen=True, slots=True)
class LatentHeads:
    """What this rank's heads make of cached latents: head h has keys [Kₕ c, r] and values Vₕ c."""

    up: Weight
    """[heads * (nope_dim + value_dim), latent]: of each head Kₕ, then Vₕ."""
    nope_dim: int
    value_dim: int
    scale: float
    """What scores are multiplied with."""

    @property
    def keys(self) -> torch.Tensor:
        """The view K, [heads, nope_dim, latent], where ``up`` is not packed."""
        return self._by_head[:, : self.nope_dim]

    @property
    def values(self) -> torch.Tensor:
        """The view V, [heads, value_dim, latent], likewise."""
        return self._by_head[:, self.nope_dim :]

    @property
    def _by_head(self) -> torch.Tensor:
        assert isinstance(self.up, torch.Tensor), type(self.up)
        return self.up.view(-1, self.nope_dim + self.value_dim, self.up.shape[1])


class LatentAttention(Protocol):
    """Attention of one layer over cached latents; made once, by ``Backend.latent_attention``.

    A token's line in the cache is its latent c and its rotated key part r: the keys of one KV head, with no
    values beside them (``KVGroup.kind`` latent).
    """

    def rope_and_store(
        self, queries: torch.Tensor, lines: torch.Tensor, rotation: torch.Tensor, plan: AttentionPlan
    ) -> None:
        """Rotate the last features of ``queries`` and ``lines`` in place and write lines to the cache.

        Queries are [tokens, heads, nope_dim + rope], lines [tokens, latent + rope], ``rotation``
        [tokens, 3, rope / 2]: cos, -sin, sin. Pairs that rotate are neighbours, (0, 1), (2, 3), …, as
        DeepSeek's checkpoints have them: nothing is permuted, neither at load nor here.
        """

    def attend(self, queries: torch.Tensor, lines: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """Return causal attention of each row over its context: [tokens, heads * value_dim].

        Queries and lines: those of ``rope_and_store`` of the same tokens.
        """


class Backend(Protocol):
    """Kernels of one device kind. ``x`` is [tokens, features] everywhere."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""

    def linear(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Return ``x @ weight.T`` in x's dtype; weight is [out, in], never unpacked whole."""

    def linear_update(
        self, residual: torch.Tensor, x: torch.Tensor, weight: Weight, comm: Communicator
    ) -> torch.Tensor | None:
        """Return ``x @ weight.T``, a partial sum that ``reduce_add`` or ``reduce_add_norm`` is to add.

        None where the product was added to ``residual`` in place: without a group, where that is faster.
        """

    def logits(self, x: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Return ``x @ weight.T`` in float32, whatever the dtype of its factors."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Return x / sqrt(mean(x²) + eps) · weight."""

    def norm_heads(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """Replace each head of x by its RMS norm; weight is [head_dim].

        ``x`` [tokens, heads * head_dim] may be some columns of a wider matrix.
        """

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

    def swiglu_linear(self, x: torch.Tensor, gate_up: Weight) -> torch.Tensor:
        """Return silu(gate) · up of ``x @ gate_up.T``, whose features are gate first and then up."""

    def experts(self, weights: ExpertWeights, routing: Routing) -> Experts:
        """Return the layer's experts, ready to run. ``weights`` may not be read before the first step.

        Errors: ``UnsupportedModelError`` where this backend cannot run them; a step never fails so.
        """

    def embed(self, token_ids: torch.Tensor, weight: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """Return rows ``token_ids - first`` of weight, zeros for ids outside [first, first + count)."""

    def rope_and_store(
        self, qkv: torch.Tensor, rotation: torch.Tensor, cache: LayerCache, plan: AttentionPlan
    ) -> torch.Tensor:
        """Rotate q and k of [q | k | v] and write k and v to their cache lines; return what to attend with.

        ``rotation`` is [tokens, 3, key_dim / 2]: cos, -sin, sin. ``qkv`` may be changed.
        """

    def rotate_neighbours(self, x: torch.Tensor, rotation: torch.Tensor) -> None:
        """Rotate x in place, features (0, 1), (2, 3), … of each head against each other.

        ``x`` [tokens, heads * dim] may be some columns of a wider matrix; ``rotation`` is
        [tokens, 3, dim / 2]: cos, -sin, sin.
        """

    def store(self, qkv: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """Write k and v of [q | k | v] to their cache lines as they are; return what to attend with."""

    def attend(self, rotated: torch.Tensor, cache: LayerCache, plan: AttentionPlan) -> torch.Tensor:
        """Return causal attention of each row over its context: [tokens, heads * value_dim].

        Scores are scaled by 1 / sqrt(key_dim). ``rotated``: from ``rope_and_store`` or ``store`` of the
        same tokens. A token sees all before it, or of these its chunk, as the cache's KV group says.
        """

    def latent_attention(self, heads: LatentHeads, cache: LayerCache) -> LatentAttention:
        """Return attention over a layer's latents. ``heads.up`` may not be read before the first step.

        Errors: ``UnsupportedModelError`` where this backend has none; a step never fails so.
        """
