"""What a server tells its user: the boot as it goes, its end, and what its ranks write."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

import msgspec

from orchestrator.boot_report import BootReport, size
from protocol.control import Progress, Ready
from protocol.errors import TandemError
from protocol.runtime_dir import InstanceFacts

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_INTERVAL_S: Final = 2.0
"""Between two lines of the same progress where there is no terminal."""


class Display(Protocol):
    """What ``serve`` reports to. Nothing here may raise."""

    def boot_begins(self, what: str, world_size: int) -> None:
        """Ranks have been started."""

    def progress(self, message: Progress | Ready) -> None:
        """A rank is so far."""

    def output(self, ranks: tuple[int, ...], line: str) -> None:
        """Show a line that a rank wrote to standard error."""

    def ready(self, report: BootReport, facts: InstanceFacts) -> None:
        """Requests are taken."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def failed(self, error: TandemError) -> None:
        """The boot, or the instance, has failed."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class LoadTally:
    """Owner of how far the ranks are: bytes over all of them, and who is ready."""

    def __init__(self) -> None:
        self._ranks: dict[int, Progress] = {}
        self._began_s: float | None = None
        self._began_bytes = 0
        self.num_ready = 0
        self.phase = ""

    def add(self, message: Progress | Ready) -> None:
        """Take a message in."""
        if isinstance(message, Ready):
            self.num_ready += 1
            return
        if self._began_s is None:
            self._began_s, self._began_bytes = time.monotonic(), message.done_bytes
        self.phase = message.phase
        self._ranks[message.rank] = message

    @property
    def done_bytes(self) -> int:
        """Bytes read, over all ranks."""
        return sum(p.done_bytes for p in self._ranks.values())

    @property
    def total_bytes(self) -> int:
        """Bytes to read, over the ranks that have said."""
        return sum(p.total_bytes for p in self._ranks.values())

    @property
    def gb_per_s(self) -> float:
        """Rate since the first message; what was read before it took a time that nobody has told."""
        seconds = time.monotonic() - self._began_s if self._began_s is not None else 0.0
        return (self.done_bytes - self._began_bytes) / 1e9 / seconds if seconds > 0 else 0.0


class PlainDisplay:
    """Lines to a stream. ``answers``: where one JSON object goes, the facts when ready or the error."""

    def __init__(self, stream: TextIO, answers: TextIO | None = None, columns: int = 100) -> None:
        self._stream, self._answers, self._columns = stream, answers, columns
        self._tally = LoadTally()
        self._next_s = 0.0
        self._world_size = 0

    def boot_begins(self, what: str, world_size: int) -> None:
        """Say what is being started."""
        self._world_size = world_size
        self.note(what)

    def progress(self, message: Progress | Ready) -> None:
        """Say how far the ranks are, now and then."""
        self._tally.add(message)
        now_s = time.monotonic()
        if isinstance(message, Progress) and now_s >= self._next_s:
            self._next_s = now_s + PLAIN_INTERVAL_S
            tally = self._tally
            rate = f", {tally.gb_per_s:.2f} GB/s" if tally.gb_per_s > 0 else ""
            self.note(f"{tally.phase}: {size(tally.done_bytes)} of {size(tally.total_bytes)}{rate}")

    def output(self, ranks: tuple[int, ...], line: str) -> None:
        """Show a rank's line."""
        self.note(f"{_ranks_name(ranks)} | {line}")

    def ready(self, report: BootReport, facts: InstanceFacts) -> None:
        """Show the report."""
        self._show_report(report)
        self.note(f"{facts.name} is ready at {facts.address}")
        self._answer(facts)

    def note(self, text: str) -> None:
        """Write a line. A stream that nobody reads any more is no reason to end."""
        try:
            self._stream.write(f"{text}\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # Nobody is there to be told.

    def failed(self, error: TandemError) -> None:
        """Say the error."""
        self.note(f"Error: {error.message}")
        self._answer({"error": error.info()})

    def close(self) -> None:
        """Do nothing."""

    def _show_report(self, report: BootReport) -> None:
        with self._console() as console:
            from orchestrator.waterfall import render

            console.print(render(report, self._columns))

    @contextmanager
    def _console(self) -> "Iterator[Console]":
        from rich.console import Console

        try:
            yield Console(file=self._stream, width=self._columns, color_system=None, highlight=False)
        except OSError:
            pass  # Nobody is there to be told.

    def _answer(self, answer: Any) -> None:
        answers, self._answers = self._answers, None
        if answers is not None:
            try:
                answers.write(msgspec.json.encode(answer).decode() + "\n")
                answers.flush()
            except OSError:
                pass  # Whoever asked is gone.


class LiveDisplay(PlainDisplay):
    """A terminal: a bar while the boot goes on, then the waterfall."""

    def __init__(self, stream: TextIO, answers: TextIO | None = None, *, colour: bool = True) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        self._rich = Console(file=stream, no_color=not colour, highlight=False, force_terminal=True)
        super().__init__(stream, answers, self._rich.width)
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
        # Redrawn by messages and no thread of its own: the event loop is this process's one thread.
        self._bar = Progress(
            *columns,
            console=self._rich,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("starting", total=None)

    def boot_begins(self, what: str, world_size: int) -> None:
        """Show the bar."""
        super().boot_begins(what, world_size)
        self._bar.start()
        self._bar.refresh()

    def progress(self, message: Progress | Ready) -> None:
        """Move the bar."""
        tally = self._tally
        tally.add(message)
        told = f"{tally.phase}, {tally.num_ready} of {self._world_size} ranks ready"
        self._bar.update(
            self._task,
            description=told,
            completed=tally.done_bytes,
            total=tally.total_bytes or None,
            refresh=True,
        )

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        from rich.control import Control
        from rich.segment import ControlType

        try:
            # Over the ^C that a terminal echoes.
            self._rich.control(Control(ControlType.CARRIAGE_RETURN))
            self._rich.print(text, markup=False, soft_wrap=True)
        except OSError:
            pass  # The terminal is gone.

    def ready(self, report: BootReport, facts: InstanceFacts) -> None:
        """Take the bar away and show the report."""
        self.close()
        super().ready(report, facts)

    def failed(self, error: TandemError) -> None:
        """Take the bar away and say the error."""
        self.close()
        super().failed(error)

    def close(self) -> None:
        """Take the bar away."""
        try:
            self._bar.stop()
        except OSError:
            pass  # The terminal is gone.

    @contextmanager
    def _console(self) -> "Iterator[Console]":
        try:
            yield self._rich
        except OSError:
            pass  # The terminal is gone.


def make_display(
    stream: TextIO = sys.stderr, answers: TextIO | None = None, *, colour: bool = True
) -> Display:
    """Return the display for a stream: live on a terminal, plain lines otherwise."""
    if stream.isatty():
        return LiveDisplay(stream, answers, colour=colour)
    return PlainDisplay(stream, answers)


def _ranks_name(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
