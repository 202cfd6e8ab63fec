"""What a rank writes to standard error, as lines on the event loop."""

import asyncio
import os
from collections.abc import Callable
from typing import Final

READ_BYTES: Final = 1 << 16
MAX_LINE_BYTES: Final = 4096
"""A longer line is cut into several."""


class OutputPipe:
    """Owns the reading of one non-blocking pipe; the descriptor stays its opener's to close."""

    def __init__(self, fd: int, on_line: Callable[[str], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = fd
        self._on_line = on_line
        self._rest = b""
        self._last = ""
        self._is_open = True
        self._loop.add_reader(fd, self._read)

    def finish(self) -> str:
        """Take what is left, stop reading, and return the last line that was not blank."""
        while self._read():
            pass
        self._close()
        return self._last

    def _read(self) -> bool:
        """Take one piece; False where there is none now."""
        if not self._is_open:
            return False
        try:
            piece = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return False
        if not piece:
            self._close()
            return False
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self._say(line)
        while len(self._rest) > MAX_LINE_BYTES:
            self._say(self._rest[:MAX_LINE_BYTES])
            self._rest = self._rest[MAX_LINE_BYTES:]
        return True

    def _say(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._last = text or self._last
        self._on_line(text)

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.remove_reader(self._fd)
            if self._rest:
                self._say(self._rest)
                self._rest = b""
