"""Where a running instance's sockets and facts lie, and who may read them.

``$XDG_RUNTIME_DIR/tandem``, else ``tandem-<uid>`` under the system's temporary directory: mode 0700,
owned by this user, no link. Each instance has a folder of its own there; an flock on its ``lock``
file is held by the orchestrator for as long as it lives, and is what "running" means.
"""

import fcntl
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import msgspec

from protocol.errors import AlreadyRunningError, InvalidRequestError, StorageError
from protocol.topology import Topology

MAX_SOCKET_PATH_BYTES: Final = 107
"""sun_path holds 108 with its terminating zero (unix(7))."""

InstanceState = Literal["starting", "ready", "draining", "failed"]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class InstanceFacts(msgspec.Struct, frozen=True):
    """What ``tandem ps`` shows; the orchestrator, its one writer, replaces the file atomically."""

    name: str
    pid: int
    model: str
    tp: int
    pp: int
    state: InstanceState
    memory_bytes: int
    """Planned, over all ranks."""
    address: str
    """Where clients connect."""
    started_at: float
    """Seconds since 1970."""
    error: str | None = None
    ep: int = 1
    dcp: int = 1

    @property
    def layout(self) -> Topology:
        """How its ranks are arranged."""
        return Topology(self.tp, self.pp, self.ep, self.dcp)


def runtime_root(environment: Mapping[str, str]) -> Path:
    """Return the private directory, made and checked.

    Errors: ``StorageError`` where it is not this user's alone.
    """
    base = environment.get("XDG_RUNTIME_DIR")
    root = Path(base) / "tandem" if base else Path(tempfile.gettempdir()) / f"tandem-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
    except OSError as error:
        raise StorageError(f"the runtime directory {root} cannot be made: {error.strerror}") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(
            f"the runtime directory {root} must be a directory of user {os.getuid()} with mode 0700, "
            f"found owner {found.st_uid}, mode {stat.filemode(found.st_mode)}: remove or repair it"
        )
    return root


class InstanceDirectory:
    """The files of one instance. Reading needs no lock; ``acquire`` makes this process its owner."""

    def __init__(self, root: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidRequestError(
                f"an instance name is 1 to 64 letters, digits, '.', '_' and '-', not {name!r}",
                field="name",
            )
        self.name = name
        self.path = root / name
        self._lock_fd: int | None = None

    @property
    def gateway_address(self) -> str:
        """ZeroMQ address for clients."""
        return _ipc(self.path / "gateway.sock")

    @property
    def control_address(self) -> str:
        """ZeroMQ address for this instance's workers."""
        return _ipc(self.path / "workers.sock")

    def rendezvous(self, epoch: int) -> Path:
        """Return the FileStore of one epoch's process group."""
        return self.path / f"rendezvous-{epoch}"

    @property
    def log_path(self) -> Path:
        """Where a server started in the background writes its standard error."""
        return self.path / "server.log"

    def acquire(self) -> None:
        """Become the instance's one owner; stale sockets of a dead owner are removed.

        Errors: ``AlreadyRunningError`` where another process holds the lock.
        """
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise AlreadyRunningError(
                f"an instance named {self.name!r} is running: stop it (tandem stop {self.name}) "
                "or choose another --name",
                field="name",
            ) from None
        self._lock_fd = lock_fd
        self._clear()

    def publish(self, facts: InstanceFacts) -> None:
        """Replace the facts; only the owner does."""
        scratch = self.path / "instance.json.new"
        scratch.write_bytes(msgspec.json.encode(facts))
        scratch.replace(self.path / "instance.json")

    def release(self) -> None:
        """Remove the instance's files and give the name back."""
        if self._lock_fd is None:
            return
        self._clear()
        (self.path / "lock").unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:
            pass  # Somebody keeps a file of theirs here, or has just taken the name.
        os.close(self._lock_fd)
        self._lock_fd = None

    def facts(self) -> InstanceFacts | None:
        """Return the facts of a running instance; None where none runs by this name."""
        if not self._is_locked():
            return None
        try:
            return msgspec.json.decode((self.path / "instance.json").read_bytes(), type=InstanceFacts)
        except (OSError, msgspec.DecodeError):
            return None

    def _is_locked(self) -> bool:
        try:
            lock_fd = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock_fd)
        return False

    def _clear(self) -> None:
        ours = ("gateway.sock", "workers.sock", "instance.json", "instance.json.new")
        for entry in self.path.iterdir():
            if entry.name in ours or entry.name.startswith("rendezvous-"):
                entry.unlink(missing_ok=True)


def running_instances(root: Path) -> list[InstanceFacts]:
    """Return the facts of every running instance of this user, by name."""
    directories = [InstanceDirectory(root, p.name) for p in root.iterdir() if _NAME.fullmatch(p.name)]
    found = [directory.facts() for directory in directories]
    return sorted((f for f in found if f is not None), key=lambda f: f.name)


def _ipc(path: Path) -> str:
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise StorageError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes, a socket allows "
            f"{MAX_SOCKET_PATH_BYTES}: choose a shorter --name or XDG_RUNTIME_DIR"
        )
    return f"ipc://{path}"
