"""The device buffers behind the block ids: one page of every local layer per block.

A layer's pages lie one after another, so that neighbouring blocks are one run of tokens and are
read as a view. A token's line in a layer is its keys of all local heads, then its values. On a CPU
the memory is a memfd, which can outlive the process that filled it.
"""

import mmap
import os
from dataclasses import dataclass

import torch

from models.layout import ALIGNMENT
from models.parameter import DTYPE_BYTES
from models.spec import KVGroup, ModelSpec
from protocol.errors import MemoryBudgetError


@dataclass(frozen=True, slots=True)
class LayerCache:
    """KV of one decoder layer on this rank."""

    group: int
    """Index of its KV group: which of a row's block tables applies."""
    lines: torch.Tensor
    """[num_blocks * block_tokens, heads * (key_dim + value_dim)]; line b * block_tokens + t is token t
    of block b."""
    heads: int
    key_dim: int
    value_dim: int

    def keys_values(self, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views [heads, tokens, dim] of the keys and the values in some lines."""
        split = self.heads * self.key_dim
        return (
            lines[:, :split].view(-1, self.heads, self.key_dim).transpose(0, 1),
            lines[:, split:].view(-1, self.heads, self.value_dim).transpose(0, 1),
        )


class KVTensors:
    """Owner of one rank's KV memory: a reserved range, touched only where blocks are written."""

    def __init__(
        self,
        model: ModelSpec,
        layers: range,
        tp: int,
        num_blocks: int,
        block_tokens: int,
        kv_bytes: int,
    ) -> None:
        """Reserve ``num_blocks`` blocks for ``layers``; ``kv_bytes`` is what the plan granted."""
        needed = num_blocks * block_tokens * sum(g.bytes_per_token(tp, layers) for g in model.kv_groups)
        if needed > kv_bytes:
            raise MemoryBudgetError(
                f"{num_blocks} KV blocks of {block_tokens} tokens take {needed} bytes for layers "
                f"{layers.start} to {layers.stop - 1}, the plan grants {kv_bytes}: plan and worker "
                "are not of the same version",
                field="memory",
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.size_bytes = needed
        self.fd = os.memfd_create("tandem-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, max(needed, ALIGNMENT))
        self._memory = mmap.mmap(self.fd, max(needed, ALIGNMENT))
        self._layers: dict[int, LayerCache] = {}
        offset = 0
        for index, group in enumerate(model.kv_groups):
            for layer in group.layers:
                if layer in layers:
                    cache = self._cut(index, group, tp, offset)
                    self._layers[layer] = cache
                    offset += cache.lines.nbytes
        assert offset == needed, (offset, needed)

    def __getitem__(self, layer: int) -> LayerCache:
        """Return the cache of a decoder layer of this stage."""
        return self._layers[layer]

    def _cut(self, index: int, group: KVGroup, tp: int, offset: int) -> LayerCache:
        heads = group.local_heads(tp)
        width = heads * (group.key_dim + group.value_dim)
        count = self.num_blocks * self.block_tokens * width
        assert offset % DTYPE_BYTES[group.dtype] == 0, (group, offset)
        flat = torch.frombuffer(self._memory, dtype=getattr(torch, group.dtype), count=count, offset=offset)
        return LayerCache(index, flat.view(-1, width), heads, group.key_dim, group.value_dim)
