"""The device buffers behind the block ids: one page of every layer of a group here per block.

A block is one layer group's at a time, so the first layers of all groups share one place, the second ones
the next, and so on; a group with fewer layers here leaves the last places of its blocks empty. A layer's
pages lie one after another, so that neighbouring blocks are one run of tokens and are read as a view. A
token's line in a layer is its keys of all local heads, then its values. Whose memory it is, a memfd's or a
GPU's, is a ``Region``'s business.

A page of a float8 cache is the scales of its tokens, a byte each in the order head, key or value,
token; then their lines, a byte an element. So a head's scales of neighbouring tokens are neighbours; and
where a block has a multiple of 16 tokens, lines of 16 n elements begin at multiples of 16 bytes.
"""

import mmap
import os
from dataclasses import dataclass
from typing import Protocol

import torch

from models.blocks import block_bytes
from models.parameter import DTYPE_BYTES
from models.spec import ModelSpec
from protocol.errors import MemoryBudgetError
from protocol.topology import Topology


class Region(Protocol):
    """A run of bytes that tensors are views of."""

    def view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        """Return ``count`` elements from byte ``offset`` on, flat."""


class HostRegion:
    """Memory of a descriptor, which can outlive the process that filled it."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    @classmethod
    def anonymous(cls, name: str, size: int) -> "HostRegion":
        """Return a memfd of its own, zeros; its pages are taken as they are touched."""
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, max(size, mmap.PAGESIZE))
            return cls(mmap.mmap(fd, max(size, mmap.PAGESIZE)))
        finally:
            os.close(fd)  # The mapping keeps it.

    def view(self, dtype: torch.dtype, count: int, offset: int) -> torch.Tensor:
        """See ``Region.view``."""
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=offset)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """KV of one decoder layer on this rank."""

    group: int
    """Index of its KV group: which of a row's block tables applies."""
    lines: torch.Tensor
    """[num_blocks * block_tokens, heads * (key_dim + value_dim)]; line b * block_tokens + t is token t
    of block b. Of a float8 cache its pages, uint8 [num_blocks, bytes of a page]."""
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

    @property
    def is_float8(self) -> bool:
        """Whether elements are codes that have scales beside them."""
        return self.lines.dtype == torch.uint8

    @property
    def page_tokens(self) -> int:
        """Tokens of a float8 page."""
        dims = self.key_dim + self.value_dim
        return self.lines.shape[1] // (self.heads * (dims + self._scales_per_head))

    def codes(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the lines in float8 pages, float8_e4m3fn [pages, block_tokens, width]: a view."""
        width, tokens = self.heads * (self.key_dim + self.value_dim), self.page_tokens
        return pages[:, -tokens * width :].view(torch.float8_e4m3fn).view(-1, tokens, width)

    def scales(self, pages: torch.Tensor) -> torch.Tensor:
        """Return the scales in them, uint8 [pages, heads, keys and values, block_tokens], as k + 127."""
        tokens = self.page_tokens
        scales = pages[:, : tokens * self.heads * self._scales_per_head]
        return scales.view(-1, self.heads, self._scales_per_head, tokens)

    @property
    def _scales_per_head(self) -> int:
        return (self.key_dim > 0) + (self.value_dim > 0)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Where each layer's lines begin in one rank's KV memory."""

    num_blocks: int
    block_tokens: int
    size_bytes: int
    """Of the whole range, what lies between places among it."""
    used_bytes: int
    """What blocks can be written to."""
    offsets: dict[int, int]
    """First byte, by decoder layer; the same for layers of different groups that share a place."""
    layer_bytes: int
    """Of each place: one layer's pages of all blocks."""

    @property
    def places(self) -> tuple[int, ...]:
        """First bytes, each once."""
        return tuple(sorted(set(self.offsets.values())))

    @classmethod
    def of(
        cls,
        model: ModelSpec,
        layers: range,
        topology: Topology,
        num_blocks: int,
        block_tokens: int,
        kv_bytes: int,
        granule: int = 1,
    ) -> "KVLayout":
        """Lay ``num_blocks`` blocks of ``layers`` out, each place from a multiple of ``granule`` bytes on.

        ``kv_bytes`` is what the plan granted. Errors: ``MemoryBudgetError``; those of ``block_bytes``.
        """
        here = [[layer for layer in group.layers if layer in layers] for group in model.kv_groups]
        num_places = max(map(len, here))
        used = num_blocks * block_bytes(model, topology, layers, block_tokens)
        layer_bytes = used // max(num_places, 1)
        if used > kv_bytes:
            raise MemoryBudgetError(
                f"{num_blocks} KV blocks of {block_tokens} tokens take {used} bytes for layers "
                f"{layers.start} to {layers.stop - 1}, the plan grants {kv_bytes}: plan and worker "
                "are not of the same version",
                field="memory",
            )
        stride = -(-layer_bytes // granule) * granule
        offsets = {layer: place * stride for group in here for place, layer in enumerate(group)}
        return cls(num_blocks, block_tokens, num_places * stride, used, offsets, layer_bytes)


class KVTensors:
    """One rank's KV memory as tensors, by decoder layer."""

    def __init__(self, model: ModelSpec, topology: Topology, layout: KVLayout, region: Region) -> None:
        self._layers: dict[int, LayerCache] = {}
        for index, group in enumerate(model.kv_groups):
            heads = group.local_heads(topology)
            width = heads * (group.key_dim + group.value_dim)
            for layer in group.layers:
                if layer not in layout.offsets:
                    continue
                size, offset = layout.layer_bytes, layout.offsets[layer]
                if group.dtype == "float8":
                    lines = region.view(torch.uint8, size, offset).view(layout.num_blocks, -1)
                else:
                    count = size // DTYPE_BYTES[group.dtype]
                    lines = region.view(getattr(torch, group.dtype), count, offset).view(-1, width)
                self._layers[layer] = LayerCache(index, lines, heads, group.key_dim, group.value_dim)

    def __getitem__(self, layer: int) -> LayerCache:
        """Return the cache of a decoder layer of this stage."""
        return self._layers[layer]
