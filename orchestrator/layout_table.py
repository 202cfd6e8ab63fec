"""The matrix of layouts as people read it: one line a layout, the best marked, and why."""

from typing import TYPE_CHECKING, Final, TextIO

from models.layouts import Layout, Matrix
from models.machines import Machines
from orchestrator.boot_report import size
from orchestrator.planner import Subject

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PLAIN_COLUMNS: Final = 200
"""Width where there is no terminal."""
_BAR: Final = 24
_BAR_FROM_COLUMNS: Final = 124
"""A terminal of at least so many columns gets memory bars."""
_PARTS: Final = (("W", "blue"), ("r", "yellow"), ("K", "green"))
"""Of a bar: weights, the rest, KV cache."""


def show_matrix(
    subject: Subject, machines: Machines, matrix: Matrix, stream: TextIO, *, colour: bool
) -> None:
    """Print the layouts of ``matrix``, best first."""
    from rich.console import Console

    terminal = stream.isatty()
    console = Console(
        file=stream, no_color=not colour, highlight=False, width=None if terminal else PLAIN_COLUMNS
    )
    console.print(
        f"{subject.name} on {machines}: {subject.spec.dtype}, {size(subject.checkpoint_bytes)} on disk, "
        f"context {matrix.context:,}",
        markup=False,
    )
    console.print(_table(matrix, console))
    for refused in matrix.refused:
        console.print(f"tp {refused.tp} pp {refused.pp} is not possible: {refused.why}", markup=False)
    if matrix.best is not None:
        _print_traffic(matrix.layouts[matrix.best], console)
    console.print(matrix.why, markup=False, style="bold")


def _table(matrix: Matrix, console: "Console") -> "Table":
    from rich.table import Table
    from rich.text import Text

    many = max(layout.decode_many.rows for layout in matrix.layouts)
    has_bar = console.is_terminal and console.width >= _BAR_FROM_COLUMNS
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in (
        *("layout", "weights", "other", "KV cache", "KV tokens", "requests", "boot", "first token"),
        *("ms a token", f"tokens/s at {many}"),
    ):
        table.add_column(name, justify="right" if name != "layout" else "left", no_wrap=name == "layout")
    if has_bar:
        table.add_column("memory: W weights, r other, K KV", no_wrap=True)
    for index, layout in enumerate(matrix.layouts):
        is_best = index == matrix.best
        cells: list[str | Text] = [
            "*" if is_best else "",
            layout.name,
            size(layout.weights_bytes_per_rank),
        ]
        cells.append(size(_rest(layout)))
        if layout.fits:
            cells += [size(layout.kv_bytes_per_rank), f"{layout.kv_tokens:,}", f"{layout.requests:,}"]
        else:
            cells += [f"lacks {size(layout.lacks_bytes)}", f"{layout.kv_tokens:,}", "-"]
        speed = layout.decode_many
        note = "" if speed.rows == many else f" ({speed.rows})"
        cells += [
            f"{layout.boot_s:.1f} s",
            f"{layout.first_token_s * 1e3:,.0f} ms",
            f"{layout.decode_one.token_s * 1e3:.2f}",
            f"{speed.tokens_s:,.0f}{note}",
        ]
        if has_bar:
            cells.append(_bar(layout))
        table.add_row(*cells, style="bold" if is_best else None if layout.fits else "dim")
    return table


def _rest(layout: Layout) -> int:
    spent = sum(line.predicted_bytes for line in layout.lines)
    return spent - layout.weights_bytes_per_rank - layout.kv_bytes_per_rank


def _bar(layout: Layout) -> "Text":
    """Return the tightest rank's budget as a bar; what does not fit ends in an exclamation mark."""
    from rich.text import Text

    sizes = (layout.weights_bytes_per_rank, _rest(layout), layout.kv_bytes_per_rank)
    scale = _BAR / max(layout.budget_bytes, sum(sizes))
    bar = Text()
    for (letter, style), part in zip(_PARTS, sizes, strict=True):
        bar.append(letter * round(part * scale), style=style)
    if not layout.fits:
        bar.append("!", style="red")
    return bar


def _print_traffic(best: Layout, console: "Console") -> None:
    for message in best.traffic:
        times = "once" if message.count == 1 else f"{message.count} times"
        console.print(
            f"{message.what}: over {message.link}, {times} a step, {size(message.bytes_per_token)} a token",
            markup=False,
        )
