"""What every fault must lead to, seen by clients, by the facts file and by the process table."""

import time

import pytest

from protocol.client import Failed, Started
from tests.faults.harness import SLOW, Server
from tests.faults.streams import Streams

NOTICE_S = 1.0
"""From a death or a stop to the moment that everyone can see it."""
LAYOUTS = [(2, 1), (2, 2)]
RANKS = [(tp, pp, rank) for tp, pp in LAYOUTS for rank in range(tp * pp)]
"""Of the full matrix."""


def matrix(*default: tuple[int, int, int]) -> pytest.MarkDecorator:
    """All ranks of all layouts; those that are not named here are for the long tests."""
    assert set(default) <= set(RANKS)
    return pytest.mark.parametrize(
        ("tp", "pp", "rank"),
        [pytest.param(*one, marks=[] if one in default else pytest.mark.long) for one in RANKS],
    )


def open_streams(client: Streams) -> None:
    """Open a stream of each kind: some that run, one that waits for a row, one that is being tokenised."""
    running = [f"running {number}" for number in range(4)]
    for stream_id in running:
        client.ask(stream_id, max_tokens=8000)
    client.ask("tokenising", messages=[{"role": "user", "content": SLOW}])
    client.ask("waiting", max_tokens=8000)
    # Messages of a connection are taken in order: what was asked before this one is open too.
    client.until(lambda: is_started(client, "waiting"), 30.0, "the last request is admitted")
    assert not client["tokenising"].events


def is_started(client: Streams, stream_id: str) -> bool:
    return any(isinstance(event, Started) for _, event in client[stream_id].events)


def all_fail(server: Server, client: Streams, since_s: float, within_s: float, *words: str) -> float:
    """Check that every open stream gets its one error, with these words, soon, and that the server ends.

    Returns how long the last of them took.
    """
    client.until_ended(within_s + 5.0)
    seen_s = server.wait_failed()
    failing(server, *words)
    client.take_rest()
    for stream in client.by_id.values():
        (failed,) = stream.terminals
        assert isinstance(failed, Failed), failed
        assert failed.error.code == "instance_failed"
        for word in words:
            assert word in failed.error.message, failed.error.message
    took_s = max(seen_s, *(stream.ended_s for stream in client.by_id.values())) - since_s
    print(f"told after {took_s:.3f} s, ended after {time.monotonic() - since_s:.3f} s")
    assert took_s < within_s
    return took_s


def failing(server: Server, *words: str) -> None:
    """Check that a server that was ready ends with an error, said in these words, and leaves nothing."""
    assert server.wait_ended() == 1, server.stderr
    told = next(line for line in server.stderr.splitlines() if line.startswith("Error: "))
    for word in words:
        assert word in told, told
