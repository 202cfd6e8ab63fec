"""Which server a client means: by name in the runtime directory, or the only one that runs."""

import os
from pathlib import Path

from protocol.errors import NotFoundError, UnavailableError
from protocol.runtime_dir import InstanceFacts, running_instances, runtime_root


def find_instance(name: str | None, runtime_directory: Path | None = None) -> InstanceFacts:
    """Return the facts of a running server; ``name`` None means the only one.

    ``runtime_directory`` None is this user's. A library has no command line above it that could read
    ``XDG_RUNTIME_DIR`` for it, so it is read here.
    Errors: ``NotFoundError`` saying what runs; ``UnavailableError`` for one that is not ready.
    """
    root = runtime_root(os.environ) if runtime_directory is None else runtime_directory
    running = running_instances(root)
    names = ", ".join(facts.name for facts in running)
    if not running:
        wanted = "no server" if name is None else f"no server named {name!r}"
        raise NotFoundError(f"{wanted} is running for this user: start one with tandem serve", field="name")
    if name is None:
        if len(running) > 1:
            raise NotFoundError(
                f"{len(running)} servers are running ({names}): say which, by name", field="name"
            )
        return _usable(running[0])
    found = next((facts for facts in running if facts.name == name), None)
    if found is None:
        raise NotFoundError(f"no server named {name!r} is running, these are: {names}", field="name")
    return _usable(found)


def _usable(facts: InstanceFacts) -> InstanceFacts:
    if facts.state == "starting":
        raise UnavailableError(
            f"the server {facts.name!r} is still starting: wait until tandem ps shows it ready"
        )
    if facts.state == "failed":
        raise UnavailableError(f"the server {facts.name!r} has failed: {facts.error or 'see its log'}")
    return facts
