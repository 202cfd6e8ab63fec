"""A load plan in figures: who reads how much, in what pieces, for whom, and how long the drive takes."""

import math
from typing import Final

import msgspec

from loader.index import SERVED_DTYPES, Checkpoint, FileEntry, TensorEntry
from loader.plan import LoadPlan
from models.parameter import DTYPE_BYTES
from models.spec import ModelSpec

_FILE_BYTES: Final = 10_000_000_000
_HEADER_DTYPES: Final = {ours: theirs for theirs, ours in SERVED_DTYPES.items()}


class RankReading(msgspec.Struct, frozen=True):
    """What one rank reads."""

    rank: int
    read_bytes: int
    reads: int
    runs: int
    """Stretches of a file without a gap, each read from its beginning to its end."""
    straight_bytes: int
    """That go unchanged to one place, in runs."""
    for_others_bytes: int
    """Arena bytes of other ranks that this one writes."""


class LoadSummary(msgspec.Struct, frozen=True):
    """What a load takes on one machine."""

    ranks: tuple[RankReading, ...]
    files: int
    read_bytes: int
    """By all ranks. No byte is read twice."""
    exchanged_bytes: int
    """Arena bytes that another rank than their owner reads."""
    uneven: float
    """By what part the largest share is larger than the mean."""
    drive_bytes_s: float
    seconds: float
    """At ``drive_bytes_s`` for all ranks together."""


def summarise(plan: LoadPlan, drive_bytes_s: float) -> LoadSummary:
    """Return the figures of a plan that has the reads of all ranks."""
    ranks = tuple(_rank(plan, rank) for rank in range(len(plan.reads)))
    total = sum(rank.read_bytes for rank in ranks)
    mean = total / len(ranks)
    return LoadSummary(
        ranks=ranks,
        files=len(plan.files),
        read_bytes=total,
        exchanged_bytes=sum(rank.for_others_bytes for rank in ranks),
        uneven=max(rank.read_bytes for rank in ranks) / mean - 1 if total else 0.0,
        drive_bytes_s=drive_bytes_s,
        seconds=total / drive_bytes_s,
    )


def _rank(plan: LoadPlan, rank: int) -> RankReading:
    straight = others = runs = 0
    end = (-1, -1)
    for read in plan.reads[rank]:
        runs += (read.file, read.offset) != end
        end = (read.file, read.offset + read.length)
        straight += read.length if read.is_direct else 0
        others += read.for_others_bytes
    return RankReading(rank, plan.bytes_read(rank), len(plan.reads[rank]), runs, straight, others)


def stated_checkpoint(model: ModelSpec) -> Checkpoint:
    """Return what a checkpoint of a model would hold: its tensors as they are stated, one after another.

    For plans without files. Published ones order tensors by layer too; where files end hardly matters.
    """
    files: list[FileEntry] = []
    tensors: dict[str, TensorEntry] = {}
    at = 0
    for parameter in model.parameters:
        for segment in parameter.segments:
            if segment.source in tensors:
                continue
            length = math.prod(segment.shape) * DTYPE_BYTES[parameter.dtype]
            if at and at + length > _FILE_BYTES:
                files.append(FileEntry(f"file {len(files)}", at, 0))
                at = 0
            tensors[segment.source] = TensorEntry(
                segment.source, _HEADER_DTYPES[parameter.dtype], segment.shape, len(files), at, length
            )
            at += length
    files.append(FileEntry(f"file {len(files)}", at, 0))
    return Checkpoint("", tuple(files), tensors)
