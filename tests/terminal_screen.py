"""A program on a terminal of its own, and what a person would see there."""

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import pexpect
import pyte

CTRL_C, CTRL_D, ENTER, ALT_ENTER = "\x03", "\x04", "\r", "\x1b\r"


class TerminalProgram:
    """Owns the child process, which is gone when the context ends, and the screen that it draws on."""

    def __init__(self, command: list[str], environment: Mapping[str, str], cwd: str) -> None:
        self._screen = pyte.HistoryScreen(100, 40, history=2000, ratio=0.5)
        self._stream = pyte.Stream(self._screen)
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env={**environment, "TERM": "xterm-256color"},
            cwd=cwd,
            dimensions=(40, 100),
            encoding="utf-8",
        )
        self.child.delaybeforesend = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.child.close(force=True)

    def send(self, keys: str) -> None:
        """Type."""
        self.child.send(keys)

    def read(self, seconds: float) -> bool:
        """Draw what comes within that time; False at the end of the program's output."""
        try:
            self._feed(self.child.read_nonblocking(65536, seconds))
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        return True

    def _feed(self, text: str) -> None:
        self._stream.feed(text)
        # prompt_toolkit asks a terminal where its cursor is, and draws when it knows.
        if "\x1b[6n" in text:
            self.child.send(f"\x1b[{self._screen.cursor.y + 1};{self._screen.cursor.x + 1}R")

    @property
    def lines(self) -> list[str]:
        """Everything that was shown, without the empty lines at the end."""
        above = ["".join(line[x].data for x in range(100)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self._screen.display]).rstrip().split("\n")

    @property
    def text(self) -> str:
        """The same as one text."""
        return "\n".join(self.lines)

    @property
    def has_colour(self) -> bool:
        """Whether any character on the screen has a colour."""
        rows = self._screen.buffer.values()
        return any(cell.fg != "default" or cell.bg != "default" for row in rows for cell in row.values())

    def wait_for(self, words: str, timeout_s: float = 30.0) -> str:
        """Wait until ``words`` are on the screen and return it; a failure shows what was there."""
        deadline = time.monotonic() + timeout_s
        while words not in self.text:
            alive = self.read(min(0.2, max(deadline - time.monotonic(), 0.01)))
            assert words in self.text or (alive and time.monotonic() < deadline), (
                f"{words!r} is not on the screen:\n{self.text}"
            )
        return self.text

    @property
    def prompts(self) -> int:
        """How many prompts have been shown."""
        return sum(line.startswith(">") for line in self.lines)

    def wait_for_prompt(self, more_than: int = 0, timeout_s: float = 30.0) -> None:
        """Wait until the last line is an empty prompt, and more than so many have been shown."""
        deadline = time.monotonic() + timeout_s
        while self.lines[-1] != ">" or self.prompts <= more_than:
            alive = self.read(0.2) and time.monotonic() < deadline
            assert alive, f"no prompt:\n{self.text}"

    def ask(self, text: str, timeout_s: float = 30.0) -> None:
        """Type a message or a command and wait until all of the answer is there."""
        shown = self.prompts
        self.send(text + ENTER)
        self.wait_for_prompt(shown, timeout_s)

    def wait_end(self, timeout_s: float = 30.0) -> int:
        """Wait for the program's end and return its exit status."""
        deadline = time.monotonic() + timeout_s
        while self.read(0.2):
            assert time.monotonic() < deadline, f"it does not end:\n{self.text}"
        self.child.wait()
        status: int = (
            self.child.exitstatus if self.child.exitstatus is not None else -self.child.signalstatus
        )
        return status
