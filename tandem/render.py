"""How tandem's commands show things: sizes, tables, text of a model on a terminal, a pull's progress."""

import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from tandem.results import Chunk

GIB = 1 << 30
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Return a number of bytes as people read it, in binary units."""
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()
) -> str:
    """Return aligned columns under their headers; those in ``right`` are aligned to the right."""
    lines = [list(headers), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    """Return text without what could steer a terminal: controls other than newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


class Screen:
    """Where a conversation is shown. Owns the knowledge of where the cursor stands.

    ``answers`` gets what the model says; ``notes`` everything else. On a terminal both are the same.
    """

    def __init__(self, answers: IO[str], notes: IO[str], *, terminal: bool, colour: bool) -> None:
        self._answers = answers
        self._notes = notes
        self.terminal = terminal
        self.colour = colour and terminal
        self._at_line_start = True
        self._shows_thoughts = False

    def thought(self, text: str) -> None:
        """Show more of what the model thinks before it answers: on a terminal, dimmed."""
        shown = printable(text)
        if shown and self.terminal:
            self._shows_thoughts = True
            self._answers.write(f"\x1b[2m{shown}\x1b[0m" if self.colour else shown)
            self._answers.flush()
            self._at_line_start = shown.endswith("\n")

    def answer(self, text: str) -> None:
        """Show more of an answer at once."""
        if self._shows_thoughts:
            self._shows_thoughts = False
            text = text.lstrip("\n")
            self.gap()
        shown = printable(text) if self.terminal else text
        if shown:
            self._answers.write(shown)
            self._answers.flush()
            self._at_line_start = shown.endswith("\n")

    def answer_of(self, has_tokenizer: bool) -> "Callable[[Chunk], None]":
        """Return what shows chunks: their text, or token ids where the model has no text."""
        if has_tokenizer:
            return self.part
        return lambda chunk: self.answer("".join(f"{token} " for token in chunk.token_ids))

    def part(self, chunk: "Chunk") -> None:
        """Show a chunk's thoughts and its text."""
        self.thought(chunk.reasoning)
        if chunk.text:
            self.answer(chunk.text)

    def ignore(self, _chunk: "Chunk") -> None:
        """Show nothing."""

    def break_line(self) -> None:
        """Go to the start of a line."""
        if not self._at_line_start:
            self.answer("\n")

    def end_answer(self, text: str) -> None:
        """Close an answer's last line; without a terminal an empty answer is an empty line."""
        if not text and not self.terminal:
            self.answer("\n")
        self.break_line()

    def gap(self) -> None:
        """Leave a line empty."""
        self.break_line()
        self.answer("\n")

    def note(self, text: str) -> None:
        """Say something that is no answer."""
        self._say(text, "2")

    def error(self, text: str) -> None:
        """Say what went wrong."""
        self._say(text, "31")

    def _say(self, text: str, style: str) -> None:
        self.break_line()
        shown = printable(text) if self.terminal else text
        print(f"\x1b[{style}m{shown}\x1b[0m" if self.colour else shown, file=self._notes, flush=True)


@contextmanager
def pull_progress(name: str, colour: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Give a callback (phase, done bytes, total bytes or 0) that draws a bar on standard error.

    Nothing is drawn where nothing is reported; without a terminal each phase is one line.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(file=sys.stderr, no_color=not colour)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )
    tasks = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            if not console.is_terminal:
                sys.stderr.write(f"{name}: {phase}\n")
            tasks[phase] = bar.add_task(f"{name}: {phase}", total=None)
            if console.is_terminal:
                bar.start()
        bar.update(tasks[phase], completed=done, total=total or None)

    try:
        yield report
    finally:
        bar.stop()
