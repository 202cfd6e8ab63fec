"""A real server with real workers, started as a user starts it, and looked at from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import msgspec

from protocol.runtime_dir import InstanceFacts
from tests.server import is_readable
from tests.tiny_llama import write_tiny_llama
from tests.unit.text_models import CHATML

T = TypeVar("T")
BOOT_S: Final = 60.0
END_S: Final = 20.0
CONTEXT: Final = 8192
"""Long enough that no stream comes to its end while it is to be open."""
MAX_ROWS: Final = 4
"""Few enough that requests wait."""
LOOK_S: Final = 0.002

SLOW: Final = "take your time"
"""A conversation of this word keeps a text helper busy for longer than any test waits."""
_SLOW_TEMPLATE: Final = (
    f"{{% if messages[0]['content'] == '{SLOW}' %}}"
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}" + CHATML
)


def write_model(path: Path) -> Path:
    """Write the model that is served; two layers, so that two stages have one each."""
    write_tiny_llama(path, template=_SLOW_TEMPLATE)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return path


def until(found: Callable[[], T | None], timeout_s: float, what: str) -> T:
    """Wait for something and return it."""
    deadline_s = time.monotonic() + timeout_s
    while (it := found()) is None:
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(LOOK_S)
    return it


class Place:
    """A runtime directory of a test's own, under a short path as sockets want it; owner of its servers.

    Every process of a server here has the place's name in its command line or title: the instance is called
    so, and the model's path leads through it. That is how leftovers are found, whoever started them.
    """

    def __init__(self, model: Path) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="tandem-faults-"))
        self.name = self.path.name
        self.model = self.path / "model"
        self.model.symlink_to(model)
        self._servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for server in self._servers:
                server.close()
        finally:
            for pid in self.processes():
                _kill(pid)
            shutil.rmtree(self.path)

    def serve(self, tp: int = 2, pp: int = 1, *, worker: str | None = None) -> "Server":
        """Start a server; ``worker``: what one of its workers does wrong (``bad_worker``)."""
        started = Server(self, tp, pp, worker)
        self._servers.append(started)
        return started

    def processes(self) -> dict[int, str]:
        """Return the command lines of the processes that live here, by process id."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (line := command_line(int(entry.name))) and self.name in line:
                found[int(entry.name)] = line
        return found

    def facts(self) -> InstanceFacts | None:
        """Return what the facts file says."""
        try:
            written = (self.path / "tandem" / self.name / "instance.json").read_bytes()
        except FileNotFoundError:
            return None
        return msgspec.json.decode(written, type=InstanceFacts)


class Server:
    """One ``tandem serve --json``, and what it says."""

    def __init__(self, place: Place, tp: int, pp: int, worker: str | None) -> None:
        self.place, self.world_size = place, tp * pp
        program = ("cli",) if worker is None else ("tests.faults.bad_server", worker)
        options = {"model": place.model, "name": place.name, "tp": tp, "pp": pp, "memory": 2}
        options |= {"max-rows": MAX_ROWS, "context": CONTEXT, "max-restarts": 0}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", *program, "serve", "--json"),
                *(f"--{name}={value}" for name, value in options.items()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": str(place.path),
                "NO_COLOR": "1",
                "PYTHONWARNINGS": "error",
            },
            start_new_session=True,
        )
        self._pidfd = os.pidfd_open(self.process.pid)
        self._errors: list[str] = []
        self._reader = threading.Thread(target=self._read_errors, name="standard error")
        self._reader.start()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line.decode().rstrip())

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def stderr(self) -> str:
        """What it has written to standard error."""
        return "\n".join(self._errors)

    # Moments.

    def wait_spawned(self, rank: int) -> int:
        """Wait for the process of a rank to exist and return its id."""
        return until(lambda: self.workers().get(rank), BOOT_S, f"rank {rank} is started")

    def wait_booting(self, rank: int) -> int:
        """Wait for a rank to have been told to boot, and return its id."""

        def booting() -> int | None:
            pid = self.workers().get(rank)
            return pid if pid is not None and command_line(pid).startswith("tandem: ") else None

        return until(booting, BOOT_S, f"rank {rank} boots")

    def wait_said(self, words: str) -> str:
        """Wait for a line on standard error that contains words."""
        found = lambda: next((line for line in self._errors if words in line), None)  # noqa: E731
        return until(found, BOOT_S, f"it says {words!r}; it said: {self.stderr}")

    def wait_ready(self) -> InstanceFacts:
        """Wait until it is ready and return its facts."""
        answer = self._answer(BOOT_S)
        assert json.loads(answer)["error"] is None, self.stderr
        return msgspec.json.decode(answer, type=InstanceFacts)

    def wait_state(self, state: str, timeout_s: float) -> InstanceFacts:
        """Wait for the facts file to say something."""

        def said() -> InstanceFacts | None:
            facts = self.place.facts()
            return facts if facts is not None and facts.state == state else None

        return until(said, timeout_s, f"the facts file says {state}; standard error: {self.stderr}")

    def _answer(self, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        assert is_readable(self.process.stdout, timeout_s), f"silent: {self.stderr}"
        line = self.process.stdout.readline()
        assert line, f"it ended without a word: {self.stderr}"
        return line

    # Processes.

    def workers(self) -> dict[int, int]:
        """Return the process ids of the ranks that live, by rank, told by command line or title."""
        found = {}
        for pid in self._children():
            words = command_line(pid).split()
            if "--rank" in words:
                found[int(words[words.index("--rank") + 1])] = pid
            elif words[:1] == ["tandem:"] and "worker" in words:
                found[int(words[-1].split("/")[0]) - 1] = pid
        return found

    def helpers(self) -> list[int]:
        """Return the process ids of the text helpers."""
        return [pid for pid in self._children() if "orchestrator.text.helper" in command_line(pid)]

    def _children(self) -> list[int]:
        try:
            listed = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return []
        return [int(pid) for pid in listed.split()]

    # The end.

    def wait_failed(self, timeout_s: float = 1.0) -> float:
        """Wait until the failure can be seen, in the facts file or by the end; return the time of that."""

        def seen() -> float | None:
            facts = self.place.facts()
            has_failed = facts is not None and facts.state == "failed"
            return time.monotonic() if has_failed or self.has_ended(0.0) else None

        return until(seen, timeout_s, f"the server notices; standard error: {self.stderr}")

    def has_ended(self, timeout_s: float) -> bool:
        """Whether its process ends within a time."""
        return is_readable(self._pidfd, timeout_s)

    def wait_ended(self, timeout_s: float = END_S) -> int:
        """Wait for its end, and see that it left nothing; return its exit code."""
        assert self.has_ended(timeout_s), f"it does not end: {self.stderr}"
        # At once, not soon: an orchestrator that ends in words ends its own first.
        left = self.place.processes()
        assert not left, f"left behind: {left}; standard error: {self.stderr}"
        assert not (self.place.path / "tandem" / self.place.name).exists()
        return self.process.wait()

    def wait_error(self) -> dict[str, Any]:
        """Wait for the end of a boot that fails, and return the error it prints."""
        assert self.wait_ended() == 1, self.stderr
        error: dict[str, Any] = json.loads(self._answer(0.0))["error"]
        return error

    def kill(self) -> float:
        """Kill the orchestrator and wait until all of its are gone; return how long they took."""
        began_s = time.monotonic()
        self.process.kill()
        until(lambda: None if self.place.processes() else True, END_S, "all processes are gone")
        took_s = time.monotonic() - began_s
        self.process.wait()
        return took_s

    def close(self) -> None:
        """End it, by force where it still runs."""
        if self.process.poll() is None:
            # Its workers and helpers go with it; who does not is found by the place.
            self.process.kill()
            self.process.wait()
            deadline_s = time.monotonic() + END_S
            while self.place.processes() and time.monotonic() < deadline_s:
                time.sleep(LOOK_S)
        os.close(self._pidfd)
        # A process that was left would hold the pipe open: the reader is not waited for without end.
        left = self.place.processes()
        for pid in left:
            _kill(pid)
        self._reader.join(END_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        assert not left, f"they outlived their server: {left}"


def command_line(pid: int) -> str:
    """Return a process's command line or title; empty for a zombie and for nobody."""
    try:
        return (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # It has ended meanwhile.


@contextmanager
def serving(model: Path, tp: int = 2, pp: int = 1, *, worker: str | None = None) -> Iterator[Server]:
    """Give a server in a place of its own; nothing of it is left after."""
    with Place(model) as place:
        yield place.serve(tp, pp, worker=worker)
