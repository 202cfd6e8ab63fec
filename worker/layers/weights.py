"""A rank's parameters: views of its arena, by name."""

import mmap

import torch

from models.layout import Arena
from models.parameter import ParameterSpec, Piece


class Weights:
    """Parameters of one rank. The arena's bytes belong to whoever made its descriptor."""

    def __init__(self, arena: Arena, tp: int, tp_rank: int, memory: mmap.mmap) -> None:
        assert len(memory) >= arena.size, (len(memory), arena.size)
        self.tp = tp
        self.tp_rank = tp_rank
        self._memory = memory
        self._placed = {placed.spec.name: placed for placed in arena.placed}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a parameter in its local shape."""
        placed = self._placed[name]
        shape = placed.spec.local_shape(self.tp)
        dtype: torch.dtype = getattr(torch, placed.spec.dtype)
        count = placed.spec.local_bytes(self.tp) // dtype.itemsize
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=placed.offset)
        return flat.view(shape)

    def spec(self, name: str) -> ParameterSpec:
        """Return the statement of a parameter."""
        return self._placed[name].spec

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Return what this rank holds of a parameter, segment by segment."""
        return self.spec(name).pieces(self.tp, self.tp_rank)
