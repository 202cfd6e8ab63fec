"""A forward pass captured in pieces: graphs for all that lies between two attentions.

Attention of a step with any shape is planned on the host, so it cannot be in a graph; everything else
depends on the number of tokens alone. Launching one kernel after another from Python would take longer than
the device needs for some hundred tokens; a replay per layer does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from worker.backends.cuda.memory import borrowed
from worker.context import AttentionPlan

SIZES = (16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 640, 768, 896, 1024)
"""Tokens; a step is padded to the next one. A step of more is launched kernel by kernel: the device takes
longer for it than Python does."""

Attend = Callable[[AttentionPlan, tuple[torch.Tensor, ...], torch.Tensor], None]
"""One layer's attention, outside of any graph: of what was given for each token, [tokens, …] each, into the
output."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the pieces of one size read, at the same addresses always."""

    token_ids: torch.Tensor
    """int64 [tokens]."""
    positions: torch.Tensor
    """int64 [tokens]."""
    lines: torch.Tensor
    """int64 [groups, tokens]; -1 for padding."""


@dataclass(frozen=True, slots=True)
class _Attention:
    """Between two pieces. Tensors do not hold their memory: what comes after them may use it."""

    attend: Attend
    group: int
    asked: tuple[torch.Tensor, ...]
    out: torch.Tensor


class Pieces:
    """One number of tokens, captured."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._attentions: list[_Attention] = []
        self._hidden: torch.Tensor | None = None

    def capture(self, pool: Any, forward: Callable[["Pieces"], torch.Tensor]) -> None:
        """Capture ``forward``, which calls ``attend`` of this object for each attention."""
        self._begin(pool)
        try:
            self._hidden = borrowed(forward(self))
        finally:
            self._graphs[-1].capture_end()

    def attend(
        self, attend: Attend, group: int, asked: tuple[torch.Tensor, ...], width: int
    ) -> torch.Tensor:
        """End a piece and begin the next; return where attention will put [tokens, width].

        ``asked``: what it is of, the queries first; ``group``: whose plan it will be given.
        """
        self._graphs[-1].capture_end()
        self._begin(self._graphs[-1].pool())
        # In the graphs' memory, and while the queries still hold theirs: the two must not be the same.
        queries = asked[0]
        out = torch.empty(queries.shape[0], width, dtype=queries.dtype, device=queries.device)
        self._attentions.append(_Attention(attend, group, tuple(map(borrowed, asked)), borrowed(out)))
        return out

    def run(self, tokens: int, plans: Sequence[AttentionPlan]) -> torch.Tensor:
        """Replay with attention in between, for the first ``tokens``; return hidden states [tokens, …].

        ``plans``: by KV group. What comes back is good until the next replay of anything in the pool.
        """
        assert self._hidden is not None
        for graph, between in zip(self._graphs, self._attentions, strict=False):
            graph.replay()
            asked = tuple(one[:tokens] for one in between.asked)
            between.attend(plans[between.group], asked, between.out[:tokens])
        self._graphs[-1].replay()
        return self._hidden[:tokens]

    def _begin(self, pool: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        # Another thread may be waiting for an event meanwhile, which only a thread's own mode allows.
        graph.capture_begin(pool, capture_error_mode="thread_local")
        self._graphs.append(graph)


def size_for(tokens: int, most: int) -> int | None:
    """Return the least size that holds so many tokens, of those up to ``most``; None: there is none."""
    return next((size for size in SIZES if tokens <= size <= most), None)
