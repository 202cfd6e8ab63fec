"""Who reads which bytes of a checkpoint, and where they go. No torch, no I/O.

Every rank of a machine computes the same plan from the model's parameters and the headers, and
executes its own part of it. A byte that any rank needs is read by exactly one rank: a contiguous slice
by the rank that owns it, rows that several ranks draw from (strided slices, replicas, tied embeddings)
in whole rows by shares that level the ranks' loads.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import msgspec

from loader.index import SERVED_DTYPES, Checkpoint, FileEntry, TensorEntry
from models.layout import Arena, arena
from models.parameter import DTYPE_BYTES, Piece
from models.spec import ModelSpec
from protocol.topology import Topology

BLOCK_BYTES = 4 << 20
"""Most bytes of one read; where more at once is faster, the reader takes neighbours together."""
SHARE_BYTES = 256 << 10
"""Rows that several ranks want are not divided more finely than this."""
MERGE_BYTES = 1 << 20
"""Neighbours are joined up to this where their bytes have to be taken apart again anyway."""
PAGE_BYTES = 4096

__all__ = ["BLOCK_BYTES", "LoadPlan", "Placement", "Read", "plan_load"]


# Structs of which there are hundreds of thousands are left out of garbage collections, which would go
# through them all again and again: they hold no cycles.


class Placement(msgspec.Struct, frozen=True, gc=False):
    """A matrix of elements inside a read, and its place in one rank's arena. Strides are in bytes."""

    rank: int
    """Whose arena."""
    tensor: str
    source_dtype: str
    dtype: str
    rows: int
    columns: int
    """Elements of a row; a contiguous run is one row."""
    source_offset: int
    """First byte, from the start of the read."""
    source_stride: int
    arena_offset: int
    """First byte, from the start of the arena."""
    arena_stride: int
    is_scales: bool = False
    """Scales of packed weights: an infinity or a NaN among them ends the load."""

    @property
    def is_plain(self) -> bool:
        """Whether the bytes go as they are, in one run."""
        return self.rows == 1 and self.source_dtype == self.dtype


class Read(msgspec.Struct, frozen=True, gc=False):
    """One run of a file that one rank reads."""

    file: int
    offset: int
    length: int
    rank: int
    """The reader."""
    placements: tuple[Placement, ...]
    """By ``source_offset``."""

    @property
    def is_direct(self) -> bool:
        """Whether every byte goes unchanged to one place, so that it can be read straight there."""
        at = 0
        for placement in self.placements:
            if not placement.is_plain or placement.source_offset != at:
                return False
            at += placement.columns * DTYPE_BYTES[placement.dtype]
        return at == self.length

    @property
    def for_others_bytes(self) -> int:
        """Arena bytes of other ranks than the reader."""
        return sum(
            p.rows * p.columns * DTYPE_BYTES[p.dtype] for p in self.placements if p.rank != self.rank
        )


class LoadPlan(msgspec.Struct, frozen=True):
    """Every read of one load."""

    files: tuple[FileEntry, ...]
    reads: tuple[tuple[Read, ...], ...]
    """Per rank, in order of file and offset; of those alone that the plan was asked for."""
    arena_bytes: tuple[int, ...]
    """Size of each rank's arena."""

    @property
    def exchanged_bytes(self) -> int:
        """Arena bytes written by another rank than their owner."""
        return sum(read.for_others_bytes for mine in self.reads for read in mine)

    def bytes_read(self, rank: int) -> int:
        """Return what one rank reads."""
        return sum(read.length for read in self.reads[rank])

    @property
    def total_bytes(self) -> int:
        """What all ranks read together."""
        return sum(self.bytes_read(rank) for rank in range(len(self.reads)))


class _Slice(msgspec.Struct, frozen=True, gc=False):
    """Rows and columns of a tensor, seen as a matrix, and their place in a rank's parameter."""

    rows: range
    columns: range
    offset: int
    """Bytes from the parameter's first to the first row's first column."""
    stride: int


class _Want(msgspec.Struct, frozen=True, gc=False):
    """What one rank draws from a tensor."""

    rank: int
    slice: _Slice
    dtype: str
    parameter_offset: int
    """The parameter's first byte in the rank's arena."""
    is_scales: bool

    @property
    def arena_offset(self) -> int:
        return self.parameter_offset + self.slice.offset


class _Run(msgspec.Struct, frozen=True, gc=False):
    """Rows of a tensor that the same ranks want."""

    tensor: TensorEntry
    row_bytes: int
    rows: range
    wants: tuple[_Want, ...]

    @property
    def size(self) -> int:
        return len(self.rows) * self.row_bytes

    @property
    def offset(self) -> int:
        return self.tensor.offset + self.rows.start * self.row_bytes

    def part(self, start: int, stop: int) -> "_Run":
        """Return rows ``[start, stop)``, counted from the run's first."""
        return _Run(self.tensor, self.row_bytes, self.rows[start:stop], self.wants)


def plan_load(
    model: ModelSpec,
    checkpoint: Checkpoint,
    topology: Topology,
    stages: tuple[range, ...],
    only: int | None = None,
) -> LoadPlan:
    """Return who reads what. ``checkpoint`` has passed ``check_against(model, checkpoint)``.

    ``stages`` are the layers of each pipeline stage. All ranks are on this machine. ``only``: the one rank
    whose reads are wanted; None: those of all.
    """
    arenas = [arena(model, topology, stages, rank) for rank in range(topology.world_size)]
    wants: dict[str, list[_Want]] = defaultdict(list)
    slicing = _Slicing()
    for held in arenas:
        for source, want in _wants(held, topology, slicing):
            wants[source].append(want)
    cutting = _Cutting()
    runs = [
        run for source, found in wants.items() for run in cutting.runs(checkpoint.tensors[source], found)
    ]
    reads = tuple(
        tuple(_merge(_reads(rank, mine))) if only in (None, rank) else ()
        for rank, mine in enumerate(_assign(runs, topology.world_size))
    )
    return LoadPlan(checkpoint.files, reads, tuple(a.size for a in arenas))


def _wants(held: Arena, topology: Topology, slicing: "_Slicing") -> Iterator[tuple[str, _Want]]:
    """Yield what one rank draws from each checkpoint tensor."""
    for placed in held.placed:
        if placed.is_alias:
            continue
        spec = placed.spec
        local = spec.flat_shape(topology)
        row_bytes = math.prod(local[1:]) * DTYPE_BYTES[spec.dtype]
        for piece in spec.pieces(topology, topology.tp_rank(held.rank)):
            if piece.end > piece.start:
                offset = placed.offset + piece.row * row_bytes
                for part in slicing.slices(piece, local, spec.dtype):
                    yield (
                        piece.source,
                        _Want(held.rank, part, spec.dtype, offset, spec.scales_of is not None),
                    )


class _Slicing:
    """``_matrix_slices``, once for all pieces that are alike: those of the same place in every layer."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], tuple[_Slice, ...]] = {}

    def slices(self, piece: Piece, local: tuple[int, ...], dtype: str) -> tuple[_Slice, ...]:
        key = (piece.source_shape, piece.dim, piece.start, piece.end, piece.destination, local, dtype)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = tuple(_matrix_slices(piece, local, DTYPE_BYTES[dtype]))
        return found


def _matrix_slices(piece: Piece, local: tuple[int, ...], size: int) -> Iterator[_Slice]:
    """Say a slice of an n-dimensional tensor in rows and columns of the matrix [rest, last dimension].

    A slice of the last dimension is a range of columns of all rows; of any other one, a range of rows
    for each index of the dimensions before it. One dimension is a matrix of one column. ``size``: bytes of
    an element of the parameter, which ``piece.row`` is not counted in.
    """
    shape = piece.source_shape
    columns = shape[-1] if len(shape) > 1 else 1
    if piece.dim > 0 and piece.dim == len(shape) - 1:
        rows, stride = range(math.prod(shape[:-1])), local[-1] * size
        yield _Slice(rows, range(piece.start, piece.end), piece.destination * size, stride)
        return
    inner = math.prod(shape[piece.dim + 1 :]) // columns if len(shape) > 1 else 1
    for outer in range(math.prod(shape[: piece.dim])):
        first = outer * shape[piece.dim]
        rows = range((first + piece.start) * inner, (first + piece.end) * inner)
        row = (outer * local[piece.dim] + piece.destination) * inner
        stride = columns * size
        yield _Slice(rows, range(columns), row * stride, stride)


class _Cutting:
    """Cuts tensors' rows where the set of ranks that want them changes; unwanted rows are left out.

    Where the borders are is found once for all tensors whose rows are wanted alike.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, ...], list[tuple[range, tuple[int, ...]]]] = {}

    def runs(self, tensor: TensorEntry, wants: list[_Want]) -> Iterator[_Run]:
        columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
        row_bytes = columns * DTYPE_BYTES[SERVED_DTYPES[tensor.dtype]]
        key = tuple(edge for want in wants for edge in (want.slice.rows.start, want.slice.rows.stop))
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = _borders(wants)
        for rows, here in found:
            yield _Run(tensor, row_bytes, rows, tuple(wants[index] for index in here))


def _borders(wants: list[_Want]) -> list[tuple[range, tuple[int, ...]]]:
    """Return rows that the same wants, by their index, cover."""
    rows = [want.slice.rows for want in wants]
    edges = sorted({edge for one in rows for edge in (one.start, one.stop)})
    return [
        (range(start, stop), here)
        for start, stop in pairwise(edges)
        if (here := tuple(i for i, one in enumerate(rows) if one.start <= start and stop <= one.stop))
    ]


def _assign(runs: list[_Run], ranks: int) -> list[list[_Run]]:
    """Give every run to a rank, in no order."""
    given: list[list[_Run]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    shared = []
    for run in runs:
        owner = run.wants[0].rank
        if len(run.wants) > 1:
            owners = {want.rank for want in run.wants}
            if len(owners) > 1:
                shared.append((run, owners))
                continue
        given[owner].append(run)
        loads[owner] += run.size
    # Largest first, so that the small ones even out what is left.
    shared.sort(key=lambda s: (-s[0].size, s[0].tensor.file, s[0].offset))
    for run, owners in shared:
        done, covered = 0, 0.0
        for rank, amount in _level(loads, owners, run.size):
            covered += amount
            until = min(round(covered / run.row_bytes), len(run.rows))
            if until > done:
                given[rank].append(run.part(done, until))
                loads[rank] += (until - done) * run.row_bytes
                done = until
        assert done == len(run.rows), (run.tensor.name, done)
    return given


def _level(loads: list[int], owners: set[int], amount: int) -> list[tuple[int, float]]:
    """Divide ``amount`` bytes between owners so that their loads become equal, without slivers."""
    chosen = sorted(owners, key=lambda rank: (loads[rank], rank))[: max(1, amount // SHARE_BYTES)]
    while True:
        level = (amount + sum(loads[rank] for rank in chosen)) / len(chosen)
        if len(chosen) == 1 or level - loads[chosen[-1]] >= SHARE_BYTES:
            return [(rank, level - loads[rank]) for rank in sorted(chosen)]
        chosen.pop()


def _reads(rank: int, runs: list[_Run]) -> list[Read]:
    """Return a rank's runs as reads, in order of file and offset."""
    runs.sort(key=lambda run: (run.tensor.file, run.offset))
    return [read for run in runs for read in _blocks(rank, run)]


def _blocks(rank: int, run: _Run) -> Iterator[Read]:
    """Yield a run in reads of at most ``BLOCK_BYTES``, cut between rows (and whole pages if they fit)."""
    step = max(1, BLOCK_BYTES // run.row_bytes)
    whole_pages = PAGE_BYTES // math.gcd(run.row_bytes, PAGE_BYTES)
    if step > whole_pages:
        step -= step % whole_pages
    for start in range(0, len(run.rows), step):
        part = run.part(start, min(start + step, len(run.rows)))
        placements = [_placement(part, want) for want in part.wants]
        placements.sort(key=lambda p: (p.source_offset, p.rank))
        yield Read(part.tensor.file, part.offset, part.size, rank, tuple(placements))


def _placement(run: _Run, want: _Want) -> Placement:
    source = SERVED_DTYPES[run.tensor.dtype]
    wanted = want.slice
    rows, columns = len(run.rows), len(wanted.columns)
    arena_offset = want.arena_offset + (run.rows.start - wanted.rows.start) * wanted.stride
    if (
        columns * DTYPE_BYTES[source] == run.row_bytes
        and columns * DTYPE_BYTES[want.dtype] == wanted.stride
    ):
        rows, columns = 1, rows * columns
    return Placement(
        rank=want.rank,
        tensor=run.tensor.name,
        source_dtype=source,
        dtype=want.dtype,
        rows=rows,
        columns=columns,
        source_offset=wanted.columns.start * DTYPE_BYTES[source],
        source_stride=run.row_bytes,
        arena_offset=arena_offset,
        arena_stride=wanted.stride,
        is_scales=want.is_scales,
    )


def _merge(reads: list[Read]) -> Iterator[Read]:
    """Join neighbours in a file, as long as that spares a call and costs no copy."""
    held: Read | None = None
    for read in reads:
        if held is not None and held.file == read.file and held.offset + held.length == read.offset:
            most = BLOCK_BYTES if held.is_direct and read.is_direct else MERGE_BYTES
            if held.length + read.length <= most:
                held = _joined(held, read)
                continue
        if held is not None:
            yield held
        held = read
    if held is not None:
        yield held


def _joined(first: Read, second: Read) -> Read:
    shifted = tuple(
        msgspec.structs.replace(p, source_offset=p.source_offset + first.length) for p in second.placements
    )
    return Read(
        first.file, first.offset, first.length + second.length, first.rank, first.placements + shifted
    )
