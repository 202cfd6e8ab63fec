"""``ModelSpec``: everything that is known of a model before torch is imported."""

import math
from typing import Literal

import msgspec

from models.parameter import DTYPE_BYTES, Cut, ParameterSpec, share
from protocol.topology import Topology


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose keys and values are kept in the same way, under one block table."""

    name: str
    layers: tuple[int, ...]
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str
    """What elements are stored in. ``float8``: e4m3, and a scale's byte for the key and for the value of
    each token and head (``kv.tensors``)."""
    kind: Literal["full", "sliding", "chunked", "latent"] = "full"
    """What the query at position p sees. ``sliding``: the last ``window`` tokens, p among them.
    ``chunked``: those from p - p % ``window`` on. ``latent``: full, and one head's keys are what the keys
    and values of all heads are computed from; it has no values of its own (``value_dim`` 0)."""
    window: int = 0
    """Tokens, for ``sliding`` and ``chunked``: the most that a query sees."""
    computed_dims: int | None = None
    """Elements of a head's key and value where a prompt is read, for ``latent``; None: those kept."""

    def local_heads(self, topology: Topology) -> int:
        """Return the KV heads that one rank of a group keeps."""
        return share(self.kv_heads, topology.tp, 0, Cut(dim=0, unit="KV head", replicate=True)).room

    def bytes_per_token(self, topology: Topology, layers: range) -> int:
        """Return what one token takes on a rank that keeps it, of the stage that runs ``layers``."""
        here = sum(1 for layer in self.layers if layer in layers)
        dims = self.key_dim + self.value_dim
        head = dims + self.scales_per_head if self.dtype == "float8" else dims * DTYPE_BYTES[self.dtype]
        return here * self.local_heads(topology) * head

    @property
    def is_local(self) -> bool:
        """Whether tokens come to lie where no later query sees them."""
        return self.kind in ("sliding", "chunked")

    def first_seen(self, position: int) -> int:
        """Return the first position that the query at ``position``, or any later one, sees."""
        if self.kind == "chunked":
            return position - position % self.window
        return max(position - self.window + 1, 0) if self.kind == "sliding" else 0

    def most_seen(self, context: float) -> float:
        """Return the most tokens that a query of a context so long sees."""
        return min(context, self.window) if self.is_local else context

    @property
    def scales_per_head(self) -> int:
        """Bytes of scales that a token has in each head of a float8 cache: its key's and its value's."""
        return (self.key_dim > 0) + (self.value_dim > 0)


class TokenChunks(msgspec.Struct, frozen=True):
    """A part of a layer that takes a step's tokens in chunks, and what it holds meanwhile."""

    tokens: int
    """At most this many at a time."""
    whole: int
    """Elements per token of a chunk that every rank holds whole."""
    cut: int
    """The same for those that are divided by tp."""
    placed: int = 0
    """What one rank may hold of each token of a chunk instead of both, where experts are placed (ep)."""

    def elements(self, step_tokens: int, topology: Topology) -> int:
        """Return the most elements that one rank holds in a step."""
        of_token = self.placed if topology.ep > 1 else self.whole + math.ceil(self.cut / topology.tp)
        return min(step_tokens, self.tokens) * of_token


class ModelSpec(msgspec.Struct, frozen=True):
    """One model, as its ``models/`` file states it from config.json."""

    architecture: str
    """Key of the forward pass in ``worker/models``."""
    config: msgspec.Struct
    """The architecture's own typed configuration."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    max_context: int
    dtype: str
    """What is computed in."""
    parameters: tuple[ParameterSpec, ...]
    skipped: tuple[str, ...]
    """Regular expressions (full match) of checkpoint tensors that are known and not needed."""
    kv_groups: tuple[KVGroup, ...]
    eos_token_ids: tuple[int, ...]
    activation_whole: int
    """Elements per token alive at a layer's widest moment that every rank holds whole."""
    activation_cut: int
    """The same for those that are divided by tp."""
    heads: int
    flops_per_token: int
    """2 × the multiply-adds of all matrix products but attention's, for one token."""
    chunks: TokenChunks | None = None
    """What is alive at another moment than ``activation_cut``, beside ``activation_whole``."""
    experts_per_token: int = 0
    """That a token chooses in a layer, of those that a parameter is a stack of."""

    def layer_parameters(self, layer: int) -> tuple[ParameterSpec, ...]:
        """Return the parameters of one decoder layer."""
        return tuple(p for p in self.parameters if p.layer == layer)
