"""What ``tandem plan --loading`` says: who reads which share of a checkpoint on one machine."""

from pathlib import Path

from loader.index import check_against, read_index
from loader.load_summary import LoadSummary, stated_checkpoint, summarise
from loader.plan import plan_load
from models.layouts import Matrix
from models.machines import Machines, check_drive
from models.spec import ModelSpec
from orchestrator.boot_report import size
from protocol.errors import InvalidRequestError, MemoryBudgetError
from protocol.topology import Topology


def loading(
    model: ModelSpec,
    directory: Path | None,
    topology: Topology,
    stages: tuple[range, ...],
    drive_bytes_s: float,
) -> LoadSummary:
    """Return the load of a model's directory, or where there is none of the tensors that it states.

    Errors: ``InvalidRequestError`` for a drive that reads nothing; those of ``read_index``.
    """
    check_drive(drive_bytes_s)
    if directory is None:
        checkpoint = stated_checkpoint(model)
    else:
        checkpoint = read_index(directory)
        check_against(model, checkpoint)
    return summarise(plan_load(model, checkpoint, topology, stages), drive_bytes_s)


def loading_on(
    model: ModelSpec, directory: Path | None, machines: Machines, matrix: Matrix, drive_bytes_s: float
) -> tuple[Topology, LoadSummary]:
    """Return the best layout of a matrix and its load.

    Errors: ``InvalidRequestError`` for more than one machine; ``MemoryBudgetError`` where nothing fits.
    """
    if machines.machines > 1:
        raise InvalidRequestError(
            f"--loading says who reads what on one machine, {machines} are {machines.machines}: plan one",
            field="gpus",
        )
    if matrix.best is None:
        raise MemoryBudgetError(matrix.why, field="memory")
    best = matrix.layouts[matrix.best]
    stages = tuple(range(first, end) for first, end in best.stages)
    return best.topology, loading(model, directory, best.topology, stages, drive_bytes_s)


def load_table(topology: Topology, summary: LoadSummary) -> str:
    """Return a load for people."""
    rows = [("RANK", "READS", "IN", "RUNS", "AT ONCE", "STRAIGHT", "FOR OTHERS")]
    for rank in summary.ranks:
        each = rank.read_bytes // max(1, rank.reads)
        straight = rank.straight_bytes / max(1, rank.read_bytes)
        rows.append(
            (
                str(rank.rank),
                size(rank.read_bytes),
                f"{rank.reads:,}",
                f"{rank.runs:,}",
                size(each),
                f"{straight:.0%}",
                size(rank.for_others_bytes),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    files = f"{summary.files} file{'s' * (summary.files > 1)}"
    return "\n".join(
        [
            *lines,
            "",
            f"{topology}: {size(summary.read_bytes)} of {files}, each byte read once; the largest share is "
            f"{summary.uneven:.2%} above the mean",
            f"{size(summary.exchanged_bytes)} are read for another rank",
            f"{summary.seconds:.2f} s at {summary.drive_bytes_s / 1e9:g} GB/s for all ranks together",
        ]
    )
