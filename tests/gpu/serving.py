"""A server on a GPU, as a user starts one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server import Place, Server

GPU = "cuda:0"
_ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def serving(model: Path, *arguments: str, workers: int = 1) -> Iterator[Server]:
    """Give a server that is ready; what it said is printed where something goes wrong."""
    with Place() as place:
        environment = place.environment
        # What libraries warn of there is not ours.
        environment.pop("PYTHONWARNINGS", None)
        # The ranks, which run in no directory, find the program where these tests did.
        found = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(found)
        server = Server(place, model, "m", arguments)
        place.servers.append(server)
        try:
            server.wait_ready()
            assert len(server.workers) == workers
            yield server
        except BaseException:
            print(server.log)
            raise
