"""kill -9 of a worker, at every moment of its life."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocol.client import Finished
from tandem import Client
from tandem.errors import InstanceFailedError
from tests.faults.bad_worker import SAID
from tests.faults.checks import LAYOUTS, NOTICE_S, all_fail, failing, matrix, open_streams
from tests.faults.harness import Server, serving, until
from tests.faults.streams import Streams


def kill(pid: int) -> float:
    """Kill a worker, and return the time."""
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def boot_fails(server: Server, rank: int, killed_s: float) -> None:
    noticed_s = server.wait_failed() - killed_s
    error = server.wait_error()
    assert error["code"] == "instance_failed"
    assert error["message"].startswith(f"rank {rank} is lost (died): "), error
    assert "SIGKILL" in error["message"]
    print(f"noticed after {noticed_s:.3f} s, ended after {time.monotonic() - killed_s:.3f} s")
    assert noticed_s < NOTICE_S


@matrix((2, 1, 0))
def test_at_its_start(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server:
        boot_fails(server, rank, kill(server.wait_spawned(rank)))


@matrix((2, 1, 0))
def test_as_it_boots(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server:
        boot_fails(server, rank, kill(server.wait_booting(rank)))


@matrix((2, 1, 1))
def test_as_it_reads(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp, worker=f"pause-load:{rank}") as server:
        server.wait_said(SAID)
        boot_fails(server, rank, kill(server.workers()[rank]))


@pytest.mark.long
def test_as_it_waits_for_one_that_reads(model: Path) -> None:
    with serving(model, worker="pause-load:0") as server:
        server.wait_said(SAID)
        boot_fails(server, 1, kill(server.workers()[1]))


@matrix((2, 1, 1))
def test_when_idle(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server, Streams(server.wait_ready().address) as client:
        client.ask("before", max_tokens=3)
        client.until_ended(30.0)
        assert isinstance(client["before"].terminals[0], Finished)
        killed_s = kill(server.workers()[rank])
        noticed_s = server.wait_failed() - killed_s
        failing(server, f"rank {rank} is lost (died)", "SIGKILL")
        print(f"noticed after {noticed_s:.3f} s, ended after {time.monotonic() - killed_s:.3f} s")
        assert noticed_s < NOTICE_S
        assert len(client["before"].terminals) == 1


@contextmanager
def sdk_stream(address: str) -> Iterator[None]:
    """Have a stream of the SDK open; it must end with the error that says who was lost."""
    with ThreadPoolExecutor(1) as pool, Client(address=address) as client:
        stream = client.stream(prompt_ids=[5, 6, 7], max_tokens=8000, ignore_eos=True)
        reading = pool.submit(list, stream)
        until(lambda: stream.prompt_ids, 30.0, "the SDK's stream is admitted")
        yield
        with pytest.raises(InstanceFailedError, match="SIGKILL"):
            reading.result(5.0)


@matrix((2, 1, 0), (2, 1, 1), (2, 2, 3))
def test_mid_step(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server:
        address = server.wait_ready().address
        with sdk_stream(address), Streams(address) as client:
            open_streams(client)
            client.until_running("running 0", "running 1", "running 2")
            killed_s = kill(server.workers()[rank])
            all_fail(server, client, killed_s, NOTICE_S, f"rank {rank} is lost (died)", "SIGKILL")


def test_while_the_server_drains(model: Path) -> None:
    with serving(model) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        client.until_running("running 0")
        os.kill(server.pid, signal.SIGTERM)
        server.wait_state("draining", 2.0)
        killed_s = kill(server.workers()[1])
        all_fail(server, client, killed_s, NOTICE_S, "rank 1 is lost (died)", "SIGKILL")


@pytest.mark.long
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_all_at_once(model: Path, tp: int, pp: int) -> None:
    with serving(model, tp, pp) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        client.until_running("running 0")
        for pid in server.workers().values():
            killed_s = kill(pid)
        all_fail(server, client, killed_s, NOTICE_S, "is lost (died)", "SIGKILL")
