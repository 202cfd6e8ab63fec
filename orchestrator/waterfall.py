"""A boot report for people: bars over time by rank, a memory table, and the one-line answer (rich)."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.boot_report import ORCHESTRATOR, BootReport, RankMemory, size
from protocol.control import Span
from protocol.topology import Topology

MAX_RANKS_SHOWN = 4
"""Bars of more ranks than this: those of the first and of the slowest."""
LABEL_COLUMNS = 48
MIN_BAR_COLUMNS = 20
_EIGHTHS = "▏▎▍▌▋▊▉█"
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


def render(report: BootReport, columns: int) -> RenderableType:
    """Return the whole report for a terminal that is so wide."""
    rate = (
        f", {size(report.load_bytes)} read at {report.load_gb_per_s:.2f} GB/s" if report.load_bytes else ""
    )
    name = report.model if report.model == report.instance else f"{report.model} as {report.instance!r}"
    layout = Topology(report.tp, report.pp, report.ep, report.dcp)
    head = f"{name}: {layout}, {report.dtype}, ready in {report.seconds:.2f} s{rate}"
    parts: list[RenderableType] = [Text(head, style="bold"), waterfall(report, columns)]
    if report.memory:
        parts.append(memory_table(_tightest(report)))
    parts.append(Text(report.why))
    if report.note:
        parts.append(Text(report.note, style="yellow"))
    return Group(*parts)


def waterfall(report: BootReport, columns: int) -> Table:
    """Return one line a span: its rank, name, times, rate, and its bar on the common axis."""
    width = max(columns - LABEL_COLUMNS, MIN_BAR_COLUMNS)
    end_s = max((span.end_s for span in report.spans), default=report.start_s)
    scale = width / max(end_s - report.start_s, 1e-9)
    table = Table(box=None, padding=(0, 1, 0, 0), show_edge=False)
    for name, justify in (("rank", "left"), ("", "left"), ("s", "right"), ("GB/s", "right")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    table.add_column(f"0 to {end_s - report.start_s:.2f} s", no_wrap=True)
    shown = ranks_shown(report.spans)
    colours: dict[str, str] = {}
    last_rank: int | None = None
    for span in report.spans:
        if span.rank not in shown:
            continue
        colour = colours.setdefault(span.name, _COLOURS[len(colours) % len(_COLOURS)])
        seconds = span.end_s - span.start_s
        table.add_row(
            "" if span.rank == last_rank else "server" if span.rank == ORCHESTRATOR else str(span.rank),
            span.name,
            f"{seconds:.2f}",
            f"{span.bytes / 1e9 / seconds:.2f}" if span.bytes and seconds > 0 else "",
            Text(bar((span.start_s - report.start_s) * scale, seconds * scale), style=colour),
        )
        last_rank = span.rank
    hidden = len({span.rank for span in report.spans}) - len(shown)
    if hidden:
        table.add_row("…", f"{hidden} more ranks", "", "", "")
    return table


def ranks_shown(spans: list[Span]) -> set[int]:
    """Return the ranks whose bars are worth a place: all, or the first and the slowest ones."""
    ends: dict[int, float] = {}
    for span in spans:
        ends[span.rank] = max(ends.get(span.rank, span.end_s), span.end_s)
    workers = sorted(rank for rank in ends if rank != ORCHESTRATOR)
    if len(workers) > MAX_RANKS_SHOWN:
        slowest = sorted(workers[1:], key=lambda rank: ends[rank])[-(MAX_RANKS_SHOWN - 1) :]
        workers = [workers[0], *slowest]
    return {*workers, *({ORCHESTRATOR} & ends.keys())}


def bar(start: float, length: float) -> str:
    """Return a bar of eighths of a column; something is always to be seen."""
    eighths = max(round(length * 8), 1)
    full, rest = divmod(eighths, 8)
    return " " * int(start) + "█" * full + (_EIGHTHS[rest - 1] if rest else "")


def memory_table(memory: RankMemory) -> Table:
    """Return a rank's lines, predicted and measured."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(f"memory of rank {memory.rank}", no_wrap=True)
    table.add_column("predicted", justify="right", no_wrap=True)
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("because")
    for line in memory.lines:
        measured = "" if line.measured_bytes is None else size(line.measured_bytes)
        table.add_row(line.name, size(line.predicted_bytes), measured, line.because)
    predicted = sum(line.predicted_bytes for line in memory.lines)
    found = [line.measured_bytes for line in memory.lines if line.measured_bytes is not None]
    table.add_row("together", size(predicted), size(sum(found)), f"of {size(memory.budget_bytes)}")
    return table


def _tightest(report: BootReport) -> RankMemory:
    def left(memory: RankMemory) -> int:
        return memory.budget_bytes - sum(
            line.measured_bytes if line.measured_bytes is not None else line.predicted_bytes
            for line in memory.lines
        )

    return min(report.memory, key=left)
