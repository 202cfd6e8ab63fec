"""A rank's parameters: views of its arena, by name."""

import torch

from kv.tensors import Region
from models.layout import Arena
from models.parameter import ParameterSpec, Piece
from protocol.topology import Topology
from worker.backends.base import BlockFloat8Weight, Int4Weight, Weight


class Weights:
    """Parameters of one rank. The arena's bytes belong to whoever made its descriptor."""

    def __init__(self, arena: Arena, topology: Topology, tp_rank: int, region: Region) -> None:
        self._topology = topology
        self.tp_rank = tp_rank
        self._region = region
        self._placed = {placed.spec.name: placed for placed in arena.placed}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a parameter in its local shape."""
        placed = self._placed[name]
        shape = placed.spec.local_shape(self._topology)
        dtype: torch.dtype = getattr(torch, placed.spec.dtype)
        count = placed.spec.local_bytes(self._topology) // dtype.itemsize
        return self._region.view(dtype, count, placed.offset).view(shape)

    def matrix(self, name: str) -> Weight:
        """Return a matrix, or a stack of them, as it is stored: packed, it comes with its scales."""
        dtype = self.spec(name).dtype
        if dtype == "int32":
            return Int4Weight(self[name], self[f"{name}_scales"])
        if dtype == "float8_e4m3fn":
            return BlockFloat8Weight(self[name], self[f"{name}_scales"])
        return self[name]

    def spec(self, name: str) -> ParameterSpec:
        """Return the statement of a parameter."""
        return self._placed[name].spec

    def local_parts(self, name: str) -> range:
        """Return which parts of a stack this rank holds."""
        return self.spec(name).local_parts(self._topology, self.tp_rank)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return what this rank holds of a parameter, segment by segment."""
        return self.spec(name).pieces(self._topology, self.tp_rank)
