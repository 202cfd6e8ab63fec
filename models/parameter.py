"""A parameter is said once: its name, its checkpoint tensors, its shape and how it is cut.

Loader, planner and layers read what stands here; none restates a size. The question "what bytes of
a weight does rank r hold?" is answered by ``ParameterSpec.pieces`` and nowhere else.
"""

import math
from typing import Literal

import msgspec

from protocol.errors import LayoutError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by the name used in configurations."""

Place = Literal["first", "layer", "last"]


class Cut(msgspec.Struct, frozen=True):
    """How a parameter is divided over a tensor-parallel group along ``dim``.

    ``unit`` names the indivisible thing for error messages (a head, a row). Where units are fewer
    than ranks and ``replicate`` is set, neighbouring ranks hold copies of one unit. Where units do
    not divide and ``pad`` is set, every rank has room for the rounded-up share and the last ones
    hold less; the rest of their room stays zero.
    """

    dim: int
    unit: str
    replicate: bool = False
    pad: bool = False


class Share(msgspec.Struct, frozen=True):
    """Units ``[start, end)`` of a segment, in room for ``room`` units."""

    start: int
    end: int
    room: int


def share(units: int, tp: int, tp_rank: int, cut: Cut) -> Share:
    """Return which units of a segment one rank of a group holds.

    Errors: ``LayoutError`` where the degree is impossible, naming degrees that would do.
    """
    if units % tp == 0:
        size = units // tp
        return Share(tp_rank * size, (tp_rank + 1) * size, size)
    if cut.replicate and tp % units == 0:
        unit = tp_rank // (tp // units)
        return Share(unit, unit + 1, 1)
    if cut.pad:
        size = math.ceil(units / tp)
        return Share(min(tp_rank * size, units), min((tp_rank + 1) * size, units), size)
    raise LayoutError(
        f"tensor parallel {tp} cannot divide {units} {cut.unit}s; degrees that do: "
        + ", ".join(str(d) for d in range(1, units + 1) if units % d == 0),
        field="tp",
    )


class Segment(msgspec.Struct, frozen=True):
    """One checkpoint tensor inside a parameter. Segments of a fused one lie one after another in dim 0."""

    source: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Whole, as on disk and in the parameter."""
    units: int = 1
    """Indivisible units along the cut; ``shape[cut.dim]`` is a multiple of it."""


class Piece(msgspec.Struct, frozen=True):
    """A slice ``[start, end)`` along ``dim`` of a checkpoint tensor, and its place in a rank's."""

    source: str
    source_shape: tuple[int, ...]
    dim: int
    start: int
    end: int
    destination: int
    """First index along ``dim`` in the local parameter."""


class ParameterSpec(msgspec.Struct, frozen=True):
    """One parameter as the forward pass sees it."""

    name: str
    """Such as ``layers.3.qkv``."""
    segments: tuple[Segment, ...]
    dtype: str
    place: Place = "layer"
    """On which stage: with its layer, the first (embedding) or the last (norm, head)."""
    layer: int = -1
    cut: Cut | None = None
    """None: whole on every rank of the group."""
    alias_of: str | None = None
    """Shares the bytes of this parameter where both are on one rank (tied embeddings)."""

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """Return the shape that each rank of a group of ``tp`` holds (the same on all)."""
        first = list(self.segments[0].shape)
        if self.cut is None:
            first[0] = sum(s.shape[0] for s in self.segments)
            return tuple(first)
        dim = self.cut.dim
        rooms = [share(s.units, tp, 0, self.cut).room * self._unit_size(s) for s in self.segments]
        if dim == 0:
            first[0] = sum(rooms)
        else:
            first[0] = sum(s.shape[0] for s in self.segments)
            first[dim] = rooms[0]
        return tuple(first)

    def local_bytes(self, tp: int) -> int:
        """Return the bytes of ``local_shape``."""
        return math.prod(self.local_shape(tp)) * DTYPE_BYTES[self.dtype]

    def pieces(self, tp: int, tp_rank: int) -> tuple[Piece, ...]:
        """Return what one rank of the group holds, segment by segment."""
        found = []
        offset = 0
        for segment in self.segments:
            if self.cut is None:
                rows = segment.shape[0]
                found.append(Piece(segment.source, segment.shape, 0, 0, rows, offset))
                offset += rows
                continue
            held = share(segment.units, tp, tp_rank, self.cut)
            size = self._unit_size(segment)
            found.append(
                Piece(
                    segment.source,
                    segment.shape,
                    self.cut.dim,
                    held.start * size,
                    held.end * size,
                    offset,
                )
            )
            offset += held.room * size
        return tuple(found)

    def _unit_size(self, segment: Segment) -> int:
        assert self.cut is not None
        extent = segment.shape[self.cut.dim]
        assert extent % segment.units == 0, (self.name, segment)
        assert len(self.segments) == 1 or self.cut.dim == 0, "fused segments are cut in dim 0"
        return extent // segment.units
