"""Mixture of experts as data: how tokens choose experts, and what a layer of them holds in a step.

A model's file states one ``Routing``; its layers' parameters are ``experts_gate_up`` and
``experts_down``, stacked over experts, beside ``router`` and, where tokens choose by a corrected
score, ``router_bias``. ``worker/layers/moe.py`` runs them.
"""

from typing import Literal

import msgspec

from models.parameter import Cut, ParameterSpec, Segment
from models.spec import TokenChunks
from protocol.errors import ModelFormatError

CHUNK_TOKENS = 1024
"""Tokens that go through a layer's experts together: a step of more is taken in pieces, so that what
every choice of every token holds is bounded whatever the step."""


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


def expert_chunks(routing: Routing, hidden: int, intermediate: int) -> TokenChunks:
    """Return what a layer's routed experts hold for a chunk of tokens.

    For each of a token's choices: its input, gathered by expert, and its output, both whole; gate|up
    and their product, which the group divides. Beside them the choices' sum, which may be in float32.
    ``intermediate`` is one expert's, whole.
    """
    return TokenChunks(CHUNK_TOKENS, (routing.top_k + 1) * 2 * hidden, routing.top_k * 3 * intermediate)


def expert_parameters(
    layer: int, source: str, routing: Routing, hidden: int, intermediate: int, dtype: str
) -> tuple[ParameterSpec, ...]:
    """Return what ``worker.layers.moe.MoE`` needs of a layer, its experts cut by their inner features.

    ``source`` is the block's prefix in the checkpoint (``model.layers.3.mlp.``), which has a tensor for
    each projection of each expert, ``intermediate`` the inner features of one. The router stays whole.
    """

    def one(name: str, tensor: str, shape: tuple[int, ...], kind: str) -> ParameterSpec:
        segment = Segment(f"{source}gate.{tensor}", shape)
        return ParameterSpec(f"layers.{layer}.{name}", (segment,), kind, layer=layer)

    def stacked(name: str, projections: tuple[str, ...], shape: tuple[int, int], dim: int) -> ParameterSpec:
        segments = tuple(
            Segment(f"{source}experts.{expert}.{projection}_proj.weight", shape, intermediate)
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
