"""A parameter is said once: its name, its checkpoint tensors, its shape and how it is cut.

Loader, planner and layers read what stands here; none restates a size. The question "what bytes of
a weight does rank r hold?" is answered by ``ParameterSpec.pieces`` and nowhere else.
"""

import math
from typing import Literal

import msgspec

from protocol.errors import LayoutError
from protocol.topology import Topology

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int32": 4, "float8_e4m3fn": 1}
"""Bytes of an element, by the name used in configurations. The last two hold packed weights."""

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


class Segment(msgspec.Struct, frozen=True, gc=False):
    """One checkpoint tensor inside a parameter. Segments of a fused one lie one after another in dim 0."""

    source: str
    """Name in the checkpoint."""
    shape: tuple[int, ...]
    """Whole, as on disk and in the parameter."""
    units: int = 1
    """Indivisible units along the cut; ``shape[cut.dim]`` is a multiple of it."""
    repeats: int = 1
    """The tensor is so many equal parts along the cut (gate, then up), of ``units`` each and cut alike."""


class Piece(msgspec.Struct, frozen=True):
    """A slice ``[start, end)`` along ``dim`` of a checkpoint tensor, and its place in a rank's."""

    source: str
    source_shape: tuple[int, ...]
    dim: int
    start: int
    end: int
    destination: int
    """First index along ``dim`` in the local parameter, whose segments lie in dim 0."""
    row: int = 0
    """Where ``dim`` is not 0: first index of the piece along dim 0."""


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
    stack: int = 0
    """Above 0: the segments are those of this many equal parts, one after another (a layer's experts, each
    its gate and its up), and the parameter has a dimension for the parts before the others. Under
    ``Topology.ep`` parts are placed over the group, each whole on one rank, and ``cut`` does not count.
    A stack may be one checkpoint tensor too, which then has that dimension itself."""
    scales_of: str | None = None
    """The packed parameter whose codes these are the scales of (``models.packing``): finite numbers."""

    def local_shape(self, topology: Topology) -> tuple[int, ...]:
        """Return the shape that each rank of a group holds (the same on all)."""
        rows, *others = self.flat_shape(topology)
        if not self.stack or self._is_one_tensor:
            return (rows, *others)
        parts = len(self.local_parts(topology, 0))
        return (parts, rows // parts, *others)

    def local_parts(self, topology: Topology, tp_rank: int) -> range:
        """Return which parts of a stack one rank of a group holds, in whole or a cut of each.

        Errors: ``LayoutError`` where ``ep`` does not divide them, naming degrees that would do.
        """
        if topology.ep == 1:
            return range(self.stack)
        size, left = divmod(self.stack, topology.ep)
        if left:
            raise LayoutError(
                f"expert parallel {topology.ep} cannot divide {self.stack} experts; degrees that do: "
                + ", ".join(str(d) for d in range(1, self.stack + 1) if self.stack % d == 0),
                field="ep",
            )
        return range(tp_rank * size, (tp_rank + 1) * size)

    def flat_shape(self, topology: Topology) -> tuple[int, ...]:
        """Return what the segments lie in, in dim 0: ``local_shape`` without a dimension for the parts."""
        if self._is_one_tensor:
            (segment,), shape = self.segments, list(self.segments[0].shape)
            shape[0] = len(self.local_parts(topology, 0))
            if self.cut is not None and not self._is_placed(topology):
                room = share(segment.units, topology.tp, 0, self.cut).room
                shape[self.cut.dim] = room * self._unit_size(segment) * segment.repeats
            return tuple(shape)
        assert len(self.segments) % (self.stack or 1) == 0, (self.name, self.stack)
        of_one = self.segments[: len(self.segments) // (self.stack or 1)]
        parts = len(self.local_parts(topology, 0)) if self.stack else 1
        shape = list(of_one[0].shape)
        rows = [s.shape[0] for s in of_one]
        if self.cut is not None and not self._is_placed(topology):
            rooms = [share(s.units, topology.tp, 0, self.cut).room * self._unit_size(s) for s in of_one]
            if self.cut.dim == 0:
                rows = rooms
            else:
                shape[self.cut.dim] = rooms[0]
        shape[0] = sum(rows) * parts
        return tuple(shape)

    def local_bytes(self, topology: Topology) -> int:
        """Return the bytes of ``local_shape``."""
        return math.prod(self.local_shape(topology)) * DTYPE_BYTES[self.dtype]

    def pieces(self, topology: Topology, tp_rank: int) -> tuple[Piece, ...]:
        """Return what one rank of the group holds, segment by segment."""
        found = []
        row = 0
        cut, segments = self.cut, self.segments
        if self._is_one_tensor:
            return self._pieces_of_one(topology, tp_rank)
        if self._is_placed(topology):
            parts, each = self.local_parts(topology, tp_rank), len(segments) // self.stack
            cut, segments = None, segments[parts.start * each : parts.stop * each]
        for segment in segments:
            source, shape = segment.source, segment.shape
            if cut is None:
                found.append(Piece(source, shape, 0, 0, shape[0], row))
                row += shape[0]
                continue
            held = share(segment.units, topology.tp, tp_rank, cut)
            size = self._unit_size(segment)
            start, end = held.start * size, held.end * size
            if cut.dim == 0:
                found.append(Piece(source, shape, 0, start, end, row))
                row += held.room * size
            else:
                found.append(Piece(source, shape, cut.dim, start, end, 0, row))
                row += shape[0]
        return tuple(found)

    def _pieces_of_one(self, topology: Topology, tp_rank: int) -> tuple[Piece, ...]:
        (segment,), cut = self.segments, self.cut
        source, shape = segment.source, segment.shape
        if cut is None or self._is_placed(topology):
            parts = self.local_parts(topology, tp_rank)
            return (Piece(source, shape, 0, parts.start, parts.stop, 0),)
        held, size = share(segment.units, topology.tp, tp_rank, cut), self._unit_size(segment)
        if held.end - held.start == segment.units:
            return (Piece(source, shape, 0, 0, shape[0], 0),)
        return tuple(
            Piece(
                source,
                shape,
                cut.dim,
                (repeat * segment.units + held.start) * size,
                (repeat * segment.units + held.end) * size,
                repeat * held.room * size,
            )
            for repeat in range(segment.repeats)
        )

    @property
    def _is_one_tensor(self) -> bool:
        return self.stack > 0 and len(self.segments) == 1 and len(self.segments[0].shape) == 3

    def _is_placed(self, topology: Topology) -> bool:
        return self.stack > 0 and topology.ep > 1

    def _unit_size(self, segment: Segment) -> int:
        assert self.cut is not None
        extent, count = segment.shape[self.cut.dim], segment.units * segment.repeats
        assert extent % count == 0, (self.name, segment)
        return extent // count
