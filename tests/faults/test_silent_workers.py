"""Workers that live and do not work: stopped by a signal, hanging in a step, raising in a step."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from orchestrator.config import Deadlines
from tests.faults.bad_worker import SAID, StepError
from tests.faults.checks import NOTICE_S, all_fail, failing, matrix, open_streams
from tests.faults.harness import Server, serving
from tests.faults.streams import Streams

STEP = 20
MARGIN_S = 1.0
"""From a step's deadline to the end of all streams."""


def stop(server: Server, rank: int) -> float:
    """Stop a worker, and return the time."""
    os.kill(server.workers()[rank], signal.SIGSTOP)
    return time.monotonic()


def idle_failure(server: Server, since_s: float, *words: str) -> None:
    noticed_s = server.wait_failed() - since_s
    failing(server, *words)
    print(f"noticed after {noticed_s:.3f} s, ended after {time.monotonic() - since_s:.3f} s")
    assert noticed_s < NOTICE_S


@matrix((2, 1, 0))
def test_stopped_when_idle(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server:
        server.wait_ready()
        idle_failure(server, stop(server, rank), f"rank {rank} is lost (stopped)", "is stopped")


@matrix((2, 1, 1))
def test_stopped_mid_step(model: Path, tp: int, pp: int, rank: int) -> None:
    with serving(model, tp, pp) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        client.until_running("running 0")
        stopped_s = stop(server, rank)
        all_fail(server, client, stopped_s, NOTICE_S, f"rank {rank} is lost (stopped)", "is stopped")


@pytest.mark.long
def test_stopped_as_it_reads(model: Path) -> None:
    with serving(model, worker="pause-load:1") as server:
        server.wait_said(SAID)
        stopped_s = stop(server, 1)
        noticed_s = server.wait_failed() - stopped_s
        error = server.wait_error()
        assert error["code"] == "instance_failed"
        assert "rank 1 is lost (stopped)" in error["message"]
        assert noticed_s < NOTICE_S


def hang(model: Path, tp: int, pp: int, wrong: str) -> None:
    with serving(model, tp, pp, worker=wrong) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        client.until(lambda: client["running 0"].token_ids, 30.0, "it answers before it hangs")
        hung_s = float(server.wait_said(SAID).split()[-1])
        sampling_rank = tp * (pp - 1)
        said = f"rank {sampling_rank} is lost (hung)"
        took_s = all_fail(server, client, hung_s, 60.0, said, "not answered", "any of them may hang")
        found = re.search(r"predicted were ([0-9.]+) s", server.stderr)
        assert found, server.stderr
        limits = Deadlines()
        deadline_s = max(limits.step_floor_s, limits.step_factor * float(found[1]))
        print(f"deadline {deadline_s:.3f} s")
        assert deadline_s * 0.8 < took_s < deadline_s + MARGIN_S


@matrix((2, 1, 0), (2, 1, 1), (2, 2, 0))
def test_a_hang_is_seen_by_the_deadline_of_its_step(model: Path, tp: int, pp: int, rank: int) -> None:
    hang(model, tp, pp, f"hang:{rank}:{STEP}")


@pytest.mark.long
def test_one_that_hangs_and_takes_no_sigterm_is_killed(model: Path) -> None:
    hang(model, 2, 1, f"hang-deaf:1:{STEP}")


@matrix((2, 1, 1))
def test_an_error_in_a_step_is_told_and_ends_the_instance(model: Path, tp: int, pp: int, rank: int) -> None:
    wrong = f"raise:{rank}:{STEP}"
    with serving(model, tp, pp, worker=wrong) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        raised_s = float(server.wait_said(SAID).split()[-1])
        said = f"rank {rank} is lost (step): {StepError.__name__}: {StepError.WORDS}"
        all_fail(server, client, raised_s, NOTICE_S, said)
        # Its traceback is for the one who reads the log; the rank itself has ended, with an error.
        assert f"rank {rank} | Traceback" in server.stderr
        assert re.search(rf"ranks ended:.*\b{rank} with exit code 1\b", server.stderr), server.stderr
