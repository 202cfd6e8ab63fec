"""End a server that runs on this machine, by its name."""

import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

from protocol.errors import NotFoundError, UnavailableError
from protocol.runtime_dir import InstanceDirectory, InstanceFacts, running_instances

GONE_S = 5.0
"""How long what was killed may take to be gone."""
PROGRESS_S = 0.5


def wait_ended(pidfd: int, timeout_s: float | None) -> bool:
    """Wait until the process of a pidfd ends; False where it has not in that time."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else max(0, round(timeout_s * 1000))))


def _find(root: Path, name: str) -> InstanceFacts:
    """Return the running instance of that name, in whatever state; ``NotFoundError`` lists what runs."""
    running = running_instances(root)
    for facts in running:
        if facts.name == name:
            return facts
    names = ", ".join(facts.name for facts in running)
    raise NotFoundError(
        f"no server named {name!r} runs; " + (f"these do: {names}" if names else "none does"), field="name"
    )


def open_process(root: Path, name: str) -> tuple[int, InstanceFacts]:
    """Return a pidfd of the instance's orchestrator, and its facts.

    Errors: ``NotFoundError``.
    """
    facts = _find(root, name)
    try:
        pidfd = os.pidfd_open(facts.pid)
    except ProcessLookupError:
        raise NotFoundError(f"the server named {name!r} has just ended", field="name") from None
    # A pid can be given to another process, the lock cannot: still locked by this pid means it is the one.
    again = InstanceDirectory(root, name).facts()
    if again is None or again.pid != facts.pid:
        os.close(pidfd)
        raise NotFoundError(f"the server named {name!r} has just ended", field="name")
    return pidfd, facts


def stop(root: Path, name: str, *, now: bool, progress: Callable[[float], None]) -> float:
    """End an instance and return the seconds until it was gone.

    It is asked to drain: requests that run are finished, for as long as they take. With ``now`` it and its
    workers are killed. ``progress`` gets the seconds so far, twice a second.

    Errors: ``NotFoundError``; ``UnavailableError`` where something killed does not go.
    """
    pidfd, facts = open_process(root, name)
    started = time.monotonic()
    try:
        if now:
            _kill_group(pidfd, facts)
        else:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            while not wait_ended(pidfd, PROGRESS_S):
                progress(time.monotonic() - started)
    except ProcessLookupError:
        pass  # It ended between the look and the signal, which is what was asked.
    finally:
        os.close(pidfd)
    return time.monotonic() - started


def _kill_group(pidfd: int, facts: InstanceFacts) -> None:
    children = [fd for pid in children_of(facts.pid) if (fd := _try_open(pid)) is not None]
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        for child in children:
            try:
                signal.pidfd_send_signal(child, signal.SIGKILL)
            except ProcessLookupError:
                pass  # Its parent's death was quicker.
        deadline = time.monotonic() + GONE_S
        for fd in (pidfd, *children):
            if not wait_ended(fd, deadline - time.monotonic()):
                raise UnavailableError(
                    f"{facts.name} was killed (pid {facts.pid}) and is not gone after {GONE_S:.0f} s: "
                    "a process of it is held by the system"
                )
    finally:
        for child in children:
            os.close(child)


def children_of(pid: int) -> list[int]:
    """Return the process ids of a process's children and theirs (proc(5))."""
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except FileNotFoundError:
        return found
    for thread in threads:
        try:
            children = [int(child) for child in (thread / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue  # The thread has just ended.
        for child in children:
            found += [child, *children_of(child)]
    return found


def _try_open(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
