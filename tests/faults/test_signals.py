"""SIGTERM and SIGINT: what runs is finished, unless somebody is in a hurry."""

import os
import signal
import time
from pathlib import Path

import pytest

from protocol.client import Failed, Finished
from tests.faults.bad_worker import SAID
from tests.faults.checks import is_started, open_streams
from tests.faults.harness import serving
from tests.faults.streams import Streams

AT_ONCE_S = 2.0
NUM_TOKENS = 500


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.long)])
def test_sigterm_finishes_what_runs_and_what_waits(model: Path, tp: int, pp: int) -> None:
    with serving(model, tp, pp) as server:
        address = server.wait_ready().address
        with Streams(address) as client, Streams(address) as other:
            asked = [f"{number}" for number in range(6)]
            for stream_id in asked:
                client.ask(stream_id, max_tokens=NUM_TOKENS, sampling={"temperature": 0.0})
            client.until_running("0", "1", "2", "3")
            client.until(lambda: is_started(client, asked[-1]), 5.0, "the last one is admitted")
            os.kill(server.pid, signal.SIGTERM)
            server.wait_state("draining", 2.0)
            os.kill(server.pid, signal.SIGTERM)
            client.ask("late")
            other.ask("late")
            other.until_ended(5.0)
            client.until(lambda: not client["late"].is_open, 5.0, "the late one is refused")
            assert all(client[stream_id].is_open for stream_id in asked), "they ended before the test"
            client.until_ended(90.0)
            assert server.wait_ended() == 0, server.stderr
            client.take_rest()
            for late in (client["late"], other["late"]):
                (refused,) = late.terminals
                assert isinstance(refused, Failed)
                assert refused.error.code == "unavailable"
            for stream_id in asked:
                (finished,) = client[stream_id].terminals
                assert isinstance(finished, Finished), finished
                assert finished.usage.completion_tokens == NUM_TOKENS
                assert len(client[stream_id].token_ids) == NUM_TOKENS
                # They asked the same.
                assert client[stream_id].token_ids == client["0"].token_ids


@pytest.mark.parametrize("first", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_second_sigint_ends_at_once(model: Path, first: signal.Signals) -> None:
    with serving(model) as server, Streams(server.wait_ready().address) as client:
        open_streams(client)
        client.until_running("running 0")
        os.kill(server.pid, first)
        server.wait_state("draining", 2.0)
        os.kill(server.pid, signal.SIGINT)
        began_s = time.monotonic()
        assert server.wait_ended(AT_ONCE_S) == 128 + signal.SIGINT, server.stderr
        print(f"ended after {time.monotonic() - began_s:.3f} s")
        client.until_ended(1.0)
        client.take_rest()
        for stream in client.by_id.values():
            (failed,) = stream.terminals
            assert isinstance(failed, Failed), failed
            assert failed.error.code == "unavailable"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_a_boot_at_once(model: Path, number: signal.Signals) -> None:
    with serving(model, worker="pause-load:1") as server:
        server.wait_said(SAID)
        os.kill(server.pid, number)
        began_s = time.monotonic()
        assert server.wait_ended(AT_ONCE_S) == 128 + number, server.stderr
        print(f"ended after {time.monotonic() - began_s:.3f} s")
