"""Products of sorted slots with their experts' weights: grouped.cu, for bf16, int4 and plain float32."""

from dataclasses import dataclass

import torch

from worker.backends.base import Int4Weight
from worker.backends.cuda.grouped_table import PLAIN_COLUMNS, Kind, Variant, choose
from worker.backends.cuda.launch import Kernel, Kernels

_FILE = "grouped"
_SIGNATURE = "PPPPPPPii"
_PLAIN_THREADS = 256
_PLAIN_OUTPUTS = 16
_NEIGHBOURS = 8
"""Pieces of a tile's outputs whose blocks stand beside each other in the grid."""

Weight = torch.Tensor | Int4Weight
"""Of a layer's local experts: [experts, outputs, k]; or such a view of [experts, k, outputs] in memory."""


@dataclass(frozen=True, slots=True)
class Slots:
    """Choices of tokens sorted by expert, as the kernels of moe.cu leave them on the device. All int32."""

    tiles: torch.Tensor
    """[most, 4]: expert, first slot, slots, unused; of up to ``columns`` tiles of 8 slots of one expert."""
    num_tiles: torch.Tensor
    """[1]: the tiles that there are."""
    rows: torch.Tensor
    """[choices]: the input row of each slot."""
    slots: torch.Tensor
    """[choices]: the slot of each choice, -1 where the expert is elsewhere."""
    offsets: torch.Tensor
    """[experts + 1]: each local expert's first slot."""
    columns: int
    likely_tiles: int
    """That a grid has room for; where there are more, blocks take several."""


class Grouped:
    """Owns the kernels that it has used; outputs are fresh tensors of torch's allocator."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._known: dict[str, Kernel] = {}

    def __call__(
        self,
        x: torch.Tensor,
        weight: Weight,
        slots: Slots,
        *,
        gathers: bool,
        gated: bool,
        few: bool,
        variant: Variant | None = None,
    ) -> torch.Tensor:
        """Return [slots, outputs] of x [rows, k]; slots that nobody fills are left as they are.

        ``gathers``: a slot's input is ``slots.rows`` of x; else it is the row of its own number. ``gated``:
        weight is [gate | up] and silu(gate) · up, half as many outputs, comes back (not in float32).
        ``few``: there are so few slots that blocks must be small to be enough. ``variant``: the
        kernel; None: what is chosen.
        """
        words, scales = (
            (weight.words, weight.scales) if isinstance(weight, Int4Weight) else (weight, weight)
        )
        k, outputs = x.shape[1], words.shape[1] // (2 if gated else 1)
        assert x.is_contiguous(), x.stride()
        choices = slots.rows.shape[0]
        out = x.new_empty(choices, outputs)
        if x.dtype == torch.float32:
            assert not gated
            assert slots.columns == PLAIN_COLUMNS, slots.columns
            name, threads, made, shared_bytes = _plain(weight), _PLAIN_THREADS, _PLAIN_OUTPUTS, 0
        else:
            variant = variant or choose(k, slots.columns, few=few, kind=kind_of(weight))
            name, threads = variant.name(gated=gated), variant.threads
            made, shared_bytes = variant.outputs(gated=gated), variant.shared_bytes
        kernel = self._known.get(name)
        if kernel is None:
            kernel = self._known[name] = self._kernels.get(_FILE, name, _SIGNATURE)
        pieces = -(-outputs // made)
        kernel(
            (slots.likely_tiles * _NEIGHBOURS, -(-pieces // _NEIGHBOURS)),
            threads,
            (
                x,
                slots.rows if gathers else 0,
                words,
                scales,
                out,
                slots.tiles,
                slots.num_tiles,
                outputs,
                k,
            ),
            shared_bytes,
        )
        return out


def kind_of(weight: Weight) -> Kind:
    """Return how weights lie."""
    if isinstance(weight, Int4Weight):
        return "int4"
    return "bf16" if weight.is_contiguous() else "turned"


def _plain(weight: Weight) -> str:
    if not isinstance(weight, Int4Weight):
        return "float32_plain" if weight.is_contiguous() else "float32_turned"
    return "int4_plain_bf16" if weight.scales.dtype == torch.bfloat16 else "int4_plain_float32"
