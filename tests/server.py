"""Real servers for tests: ``tandem serve`` as a user starts it, in a private place, ended by their ids."""

import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self

from protocol.client import Stats
from protocol.runtime_dir import running_instances, runtime_root
from tandem import Client
from tandem.instances import children_of, wait_ended

TANDEM = (sys.executable, "-P", "-m", "cli")
BOOT_S = 90.0
STOP_S = 30.0
COMMAND_S = 90.0
CLOCK_TICKS_S = os.sysconf("SC_CLK_TCK")


def until(what: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Wait for something to be true and return it."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not so within {timeout_s:g} s, but {found!r}")
        time.sleep(0.01)
    return found


def is_readable(file: int | IO[bytes], timeout_s: float) -> bool:
    """Whether a pipe or a pidfd has something to say within a time."""
    # Not ``select.select``: it refuses descriptors from 1024 up.
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Place:
    """A runtime directory and a cache of their own; owner of the servers that are started in it.

    The runtime directory lies under the system's temporary one: a socket's path must be short.
    """

    def __init__(self, cache: Path | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="td-"))
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(self.path), "PYTHONWARNINGS": "error"}
        if cache is not None:
            self.environment["XDG_CACHE_HOME"] = str(cache)
        self.servers: list[Server] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.kill()
        shutil.rmtree(self.path)

    @property
    def root(self) -> Path:
        """Where instances have their directories."""
        return self.path / "tandem"

    def running(self) -> list[str]:
        """Return the names of the servers that run here."""
        return [facts.name for facts in running_instances(runtime_root(self.environment))]

    def tandem(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run a command to its end."""
        return subprocess.run(
            [*TANDEM, *arguments],
            input=stdin,
            capture_output=True,
            env=self.environment,
            cwd=self.path,
            timeout=COMMAND_S,
        )

    def tandem_json(self, *arguments: str) -> dict[str, Any]:
        """Run a command that must do well, and return the one object that it prints."""
        done = self.tandem(*arguments, "--json")
        assert done.returncode == 0, done.stderr.decode()
        return one_object(done.stdout)

    def refusal(self, *arguments: str) -> dict[str, Any]:
        """Run a command that must fail in words, and return the error that it prints."""
        done = self.tandem(*arguments, "--json")
        errors = done.stderr.decode()
        assert done.returncode == 1, errors
        assert "Traceback" not in errors, errors
        error: dict[str, Any] = one_object(done.stdout)["error"]
        # What a person reads is what a program does; long lines are wrapped on the screen.
        assert "".join(error["message"].split()) in "".join(errors.split()), errors
        return error

    def serve(self, model: Path | str, name: str, *arguments: str) -> "Server":
        """Start a server; it is ready on return."""
        server = Server(self, model, name, arguments)
        self.servers.append(server)
        server.wait_ready()
        return server


class Server:
    """One ``tandem serve``."""

    def __init__(self, place: Place, model: Path | str, name: str, arguments: tuple[str, ...]) -> None:
        self.place, self.name = place, name
        self.log_path = place.path / f"{name}.log"
        command = [*TANDEM, "serve", "--json", "--model", str(model), "--name", name, *arguments]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=place.environment,
                cwd=place.path,
                start_new_session=True,
            )
        self.workers: list[int] = []
        """Process ids of the ranks."""
        self.facts: dict[str, Any] = {}

    @property
    def log(self) -> str:
        """What it has written to standard error."""
        return self.log_path.read_text()

    def wait_ready(self) -> None:
        """Wait for the facts."""
        assert self.process.stdout is not None
        assert is_readable(self.process.stdout, BOOT_S), f"not ready after {BOOT_S:g} s: {self.log}"
        line = self.process.stdout.readline()
        assert line, self.log
        self.facts = json.loads(line)
        assert "error" not in self.facts or self.facts["error"] is None, self.log
        self.workers = [pid for pid in children_of(self.process.pid) if " worker " in title(pid)]

    def client(self) -> Client:
        """Return a new client, found by name as a user's is."""
        return Client(self.name, runtime_directory=self.place.root)

    def stats(self) -> Stats:
        """Return its numbers, asked by a client of their own."""
        with self.client() as client:
            return client.stats()

    def wait_idle(self, timeout_s: float = 20.0) -> Stats:
        """Wait until nothing runs and every block is back; return the numbers."""
        with self.client() as client:
            return until(lambda: is_idle(client.stats()), timeout_s)  # type: ignore[no-any-return]

    def cpu_s(self) -> float:
        """Return the processor time that the orchestrator, its helpers and the ranks have had."""
        return sum(cpu_s(pid) for pid in (self.process.pid, *children_of(self.process.pid)))

    def stop(self) -> int:
        """End it in order and return its exit code. Its processes and its name are gone then."""
        pids = [self.process.pid, *children_of(self.process.pid)]
        self.process.terminate()
        code = self.process.wait(STOP_S)
        self._close()
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        assert self.name not in self.place.running()
        return code

    def kill(self) -> None:
        """End it by force where it still runs."""
        if self.process.poll() is not None:
            self._close()
            return
        pidfds = [os.pidfd_open(pid) for pid in children_of(self.process.pid)]
        self.process.kill()
        self.process.wait(STOP_S)
        # They see their parent's death.
        gone = [wait_ended(pidfd, STOP_S) for pidfd in pidfds]
        for pidfd in pidfds:
            os.close(pidfd)
        self._close()
        assert all(gone)

    def _close(self) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def served(
    model: Path | str, *arguments: str, name: str = "m", cache: Path | None = None
) -> Iterator[Server]:
    """Give a server in a place of its own; it must end in order."""
    with Place(cache) as place:
        server = place.serve(model, name, *arguments)
        yield server
        assert server.process.poll() is None, server.log
        assert server.stop() == 0, server.log


def is_idle(stats: Stats) -> Stats | None:
    """Return the numbers of a server that holds nothing for anybody, else None."""
    is_empty = stats.running == stats.waiting == 0
    return stats if is_empty and stats.blocks_free + stats.blocks_cached == stats.blocks_total else None


def one_object(stdout: bytes) -> dict[str, Any]:
    """Return the one JSON object that a command's whole output must be."""
    assert stdout.count(b"\n") == 1, stdout
    found = json.loads(stdout)
    assert isinstance(found, dict)
    return found


def title(pid: int) -> str:
    """Return what ``ps`` shows of a process."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()


def cpu_s(pid: int) -> float:
    """Return a process's user and system time (proc(5): fields 14 and 15 of stat)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_S
