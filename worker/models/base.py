"""What the runner asks of a forward pass, and which one serves which architecture."""

from collections.abc import Sequence
from typing import Protocol

import torch

from models.spec import ModelSpec
from protocol.errors import UnsupportedModelError
from worker.context import StepContext
from worker.expert_load import CountedLayer
from worker.layers.parts import Parts
from worker.models.deepseek import deepseek
from worker.models.llama import llama
from worker.models.llama4 import llama4
from worker.models.qwen3 import qwen3
from worker.models.qwen3_moe import qwen3_moe


class StageModel(Protocol):
    """One stage of one architecture on one rank."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return [tokens, hidden] of [tokens] int64. First stage only."""

    def forward(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor:
        """Return the residual stream after this stage's layers, [tokens, hidden]; may reuse ``hidden``.

        Where the step says which tokens are ``wanted``, [wanted, hidden] of these alone.
        """

    def expert_loads(self) -> Sequence[CountedLayer]:
        """Return the counters of this stage's layers with experts."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return float32 [rows, local vocabulary] of [rows, hidden]. Last stage only."""


_ARCHITECTURES = {
    "deepseek": deepseek,
    "llama": llama,
    "llama4": llama4,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}


def build(
    parts: Parts, model: ModelSpec, layers: range, context: int, *, is_first: bool, is_last: bool
) -> StageModel:
    """Return the stage that runs ``layers``; ``context`` bounds positions.

    Errors: ``UnsupportedModelError`` for an architecture without a forward pass.
    """
    architecture = _ARCHITECTURES.get(model.architecture)
    if architecture is None:
        raise UnsupportedModelError(
            f"architecture {model.architecture!r} has no forward pass here: "
            f"{', '.join(sorted(_ARCHITECTURES))} have",
            field="architectures",
        )
    for group in model.kv_groups:
        if group.kind == "sliding":
            raise UnsupportedModelError(
                f"KV group {group.name!r} is {group.kind}: full, chunked and latent attention are served"
            )
    return architecture(parts, model, layers, context, is_first=is_first, is_last=is_last)
