"""Mixture of experts as data: how tokens choose experts, and what a layer of them holds in a step.

A model's file states one ``Routing``; its layers' parameters are ``experts_gate_up`` and
``experts_down``, stacked over experts, beside ``router`` and, where tokens choose by a corrected
score, ``router_bias``. ``worker/layers/moe.py`` runs them.
"""

import math
from typing import Literal

import msgspec

from models.parameter import Cut, ParameterSpec, Segment
from models.spec import TokenChunks
from protocol.errors import ModelFormatError
from protocol.topology import Topology

CHUNK_TOKENS = 1024
"""Tokens that go through a layer's experts together: a step of more is taken in pieces, so that what
every choice of every token holds is bounded whatever the step."""

SPLIT_ABOVE_TOKENS = 1024
"""A step of no more is never split over the ranks of its experts: a GPU replays it from graphs, and to whom
an exchange deals how many tokens is known as the step runs, by the host."""
SPLIT_WORTH_BYTES = 8 << 20
"""What splitting must spare a rank's link in a layer: it has three messages more than two all-reduces, some
10 µs each, in which NVLink moves so much."""


class Routing(msgspec.Struct, frozen=True):
    """How each token chooses its experts and how much each one counts.

    Scores are the softmax over all experts or the sigmoid of each one's logit, in float32. A token
    takes the ``top_k`` experts with the highest scores (plus the correction bias, where there is
    one; only the choice sees it). A choice's weight is its score, divided by the sum of the token's
    chosen scores if ``normalize``, times ``scale``.
    """

    experts: int
    top_k: int
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    """Experts are in this many equal groups of neighbours; a token chooses within ``top_groups`` of
    them, those with the highest sum of their two best scores (corrected where there is a bias)."""
    top_groups: int = 1
    has_bias: bool = False
    """Whether a ``router_bias`` corrects the scores for the choice."""
    weighs: Literal["output", "input"] = "output"
    """What a choice's weight multiplies: what the expert returns, or what it is given."""

    def __post_init__(self) -> None:
        """Refuse what no token could follow (``ModelFormatError``)."""
        if self.experts < 1 or not 1 <= self.top_k <= self.experts:
            raise ModelFormatError(
                f"config.json: a token cannot choose {self.top_k} of {self.experts} experts",
                field="num_experts_per_tok",
            )
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.top_groups <= self.groups:
            raise ModelFormatError(
                f"config.json: {self.experts} experts cannot be chosen from {self.top_groups} of "
                f"{self.groups} equal groups",
                field="n_group",
            )
        if self.groups > 1 and self.experts // self.groups < 2:
            raise ModelFormatError(
                f"config.json: {self.groups} groups of one expert each: a group is chosen by its two best",
                field="n_group",
            )
        if self.top_k > self.experts // self.groups * self.top_groups:
            raise ModelFormatError(
                f"config.json: {self.top_groups} groups of {self.experts // self.groups} experts are "
                f"fewer than the {self.top_k} that a token chooses",
                field="topk_group",
            )


def splits_tokens(
    routing: Routing, tokens: int, hidden_bytes: int, topology: Topology, *, has_shared: bool
) -> bool:
    """Return in which form a layer of placed experts takes a step: whether its tokens are split.

    No: every rank has all tokens, runs its own experts, and an all-reduce sums. Yes: attention's sums are
    scattered, each rank sends its tokens to the ranks of their experts, adds what comes back, and all is
    gathered. Decided from sizes that are the same on all ranks.
    """
    if topology.ep == 1 or tokens <= SPLIT_ABOVE_TOKENS:
        return False
    spared = whole_bytes(hidden_bytes, topology.ep)
    spared -= split_bytes(routing, hidden_bytes, topology.ep, has_shared=has_shared)
    return tokens * spared >= SPLIT_WORTH_BYTES


def whole_bytes(hidden_bytes: int, ranks: int) -> float:
    """Return what a rank sends for each token of a step where a layer has its two all-reduces."""
    return 4 * (ranks - 1) / ranks * hidden_bytes


def split_bytes(routing: Routing, hidden_bytes: int, ranks: int, *, has_shared: bool) -> float:
    """Return the same where tokens are split: scattered, dealt out, brought back and gathered.

    Of shared experts, which are cut, every rank needs all tokens: they are gathered for them and the sums
    scattered, which takes as much again as scattering and gathering do.
    """
    scattered = (4 if has_shared else 2) * (ranks - 1) / ranks * hidden_bytes
    told = 8 * routing.top_k + 4
    return scattered + ranks_reached(routing, ranks) / ranks * (2 * hidden_bytes + told)


def ranks_reached(routing: Routing, ranks: int) -> float:
    """Return how many ranks but its own hold choices of a token, if it chooses evenly among all experts."""
    elsewhere = routing.experts - routing.experts // ranks
    none = math.comb(elsewhere, routing.top_k) / math.comb(routing.experts, routing.top_k)
    return (ranks - 1) * (1 - none)


def expert_chunks(routing: Routing, hidden: int, intermediate: int) -> TokenChunks:
    """Return what a layer's routed experts hold for a chunk of tokens.

    For each of a token's choices: its input, gathered by expert, and its output, both whole; gate|up
    and their product, which the group divides. Beside them the choices' sum, which may be in float32.
    ``intermediate`` is one expert's, whole. Where experts are placed, all of a chunk's choices may be one
    rank's: nothing is divided, and where the tokens are split, that rank holds what was sent to it, what it
    sends back, and both once more as messages.
    """
    choices, inner = (routing.top_k + 1) * 2 * hidden, routing.top_k * 3 * intermediate
    return TokenChunks(CHUNK_TOKENS, choices, inner, placed=choices + inner + 4 * hidden)


def expert_parameters(
    layer: int, source: str, routing: Routing, hidden: int, intermediate: int, dtype: str, span: int = 1
) -> tuple[ParameterSpec, ...]:
    """Return what ``worker.layers.moe.MoE`` needs of a layer, its experts cut by their inner features.

    ``source`` is the block's prefix in the checkpoint (``model.layers.3.mlp.``), which has a tensor for
    each projection of each expert, ``intermediate`` the inner features of one, ``span`` how many of them
    stay together. The router stays whole.
    """
    assert intermediate % span == 0, (intermediate, span)

    def one(name: str, tensor: str, shape: tuple[int, ...], kind: str) -> ParameterSpec:
        segment = Segment(f"{source}gate.{tensor}", shape)
        return ParameterSpec(f"layers.{layer}.{name}", (segment,), kind, layer=layer)

    def stacked(name: str, projections: tuple[str, ...], shape: tuple[int, int], dim: int) -> ParameterSpec:
        segments = tuple(
            Segment(f"{source}experts.{expert}.{projection}_proj.weight", shape, intermediate // span)
            for expert in range(routing.experts)
            for projection in projections
        )
        cut = Cut(dim=dim, unit="inner feature of an expert", pad=True)
        return ParameterSpec(
            f"layers.{layer}.{name}", segments, dtype, layer=layer, cut=cut, stack=routing.experts
        )

    bias = one("router_bias", "e_score_correction_bias", (routing.experts,), "float32")
    return (
        one("router", "weight", (routing.experts, hidden), dtype),
        *((bias,) if routing.has_bias else ()),
        stacked("experts_gate_up", ("gate", "up"), (intermediate, hidden), 0),
        stacked("experts_down", ("down",), (hidden, intermediate), 1),
    )
