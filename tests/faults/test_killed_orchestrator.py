"""kill -9 of the orchestrator: nobody is left to end the others, and they end."""

import os
import signal
from pathlib import Path

import pytest

from tests.faults.bad_worker import SAID
from tests.faults.checks import open_streams
from tests.faults.harness import Place, Server, serving
from tests.faults.streams import Streams

GONE_S = 2.0


def all_end(server: Server) -> None:
    took_s = server.kill()
    print(f"gone after {took_s:.3f} s")
    assert took_s < GONE_S


@pytest.mark.parametrize(
    ("tp", "pp", "rank"),
    [
        (2, 1, 1),
        pytest.param(2, 1, 0, marks=pytest.mark.long),
        pytest.param(2, 2, 0, marks=pytest.mark.long),
        pytest.param(2, 2, 3, marks=pytest.mark.long),
    ],
)
def test_as_workers_start(model: Path, tp: int, pp: int, rank: int) -> None:
    """They cannot ask the kernel to follow it: it was gone before they could ask."""
    with serving(model, tp, pp) as server:
        server.wait_spawned(rank)
        all_end(server)


@pytest.mark.long
def test_as_workers_boot(model: Path) -> None:
    with serving(model) as server:
        server.wait_booting(0)
        all_end(server)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_as_one_reads_and_others_wait_for_it(model: Path, tp: int, pp: int) -> None:
    with serving(model, tp, pp, worker="pause-load:1") as server:
        server.wait_said(SAID)
        assert len(server.workers()) == tp * pp
        assert server.helpers()
        all_end(server)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_mid_step_then_by_the_same_name_when_idle(model: Path, tp: int, pp: int) -> None:
    with Place(model) as place:
        first = place.serve(tp, pp)
        with Streams(first.wait_ready().address) as client:
            open_streams(client)
            client.until_running("running 0")
            assert first.helpers()
            all_end(first)
            client.take_rest()
            assert all(stream.is_open for stream in client.by_id.values())
        # What it left in the runtime directory keeps nobody from its name.
        second = place.serve(tp, pp)
        with Streams(second.wait_ready().address) as client:
            client.ask("one", max_tokens=3)
            client.until_ended(30.0)
            assert second.helpers()
            all_end(second)


@pytest.mark.long
def test_with_a_worker_that_is_stopped(model: Path) -> None:
    with serving(model) as server:
        server.wait_ready()
        os.kill(server.workers()[1], signal.SIGSTOP)
        all_end(server)


@pytest.mark.long
def test_with_workers_that_hang(model: Path) -> None:
    with serving(model, worker="hang-deaf:1:5") as server, Streams(server.wait_ready().address) as client:
        client.ask("one", max_tokens=8000)
        server.wait_said(SAID)
        all_end(server)
